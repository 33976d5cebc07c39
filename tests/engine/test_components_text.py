"""Text encoders, connectors and prompt rewriting: the reference's numbers, and folders that cannot be used."""

from __future__ import annotations

import json
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from pipeline.engine.components.connectors import load_text_connectors, text_connectors_blueprint
from pipeline.engine.components.text import TextStates
from pipeline.engine.components.text_encoder import REWRITE_INSTRUCTIONS, fill_from_files, load_text_encoder
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model import checkpoint
from pipeline.model.checkpoint import CheckpointFile
from pipeline.model.pinned_reader import PinnedReader

BOUND = 5e-6


def _connect(fixtures, case, folder, mask="in.attention_mask"):
    checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
    connectors = load_text_connectors(checkpoint, device="cpu", dtype=None)
    return connectors.connect(TextStates(case["in.hidden_states"], case[mask]))


@pytest.mark.parametrize("folder", ["text_connectors_ltx2_0", "text_connectors_ltx2_3"])
def test_trap_12_connectors_agree_with_the_reference_and_leave_no_mask(fixtures, golden, folder):
    case = golden(f"{folder}/case_process")
    context = _connect(fixtures, case, folder)
    case.assert_close("out.video_encoding", context.video_BSD, bound=BOUND)
    case.assert_close("out.audio_encoding", context.audio_BSD, bound=BOUND)
    assert context.mask_BS is None
    assert case["out.attention_mask"].all()


def test_connectors_of_ltx2_3_take_padding_on_either_side(fixtures, golden):
    case = golden("text_connectors_ltx2_3/case_process")
    context = _connect(fixtures, case, "text_connectors_ltx2_3", "in.attention_mask_right")
    case.assert_close("out.video_encoding_right", context.video_BSD, bound=BOUND)
    case.assert_close("out.audio_encoding_right", context.audio_BSD, bound=BOUND)


def test_trap_13_four_keys_choose_the_kind_of_projection(fixtures):
    kinds = {}
    for folder in ("text_connectors_ltx2_0", "text_connectors_ltx2_3"):
        config = CheckpointFile(fixtures / folder / "model.safetensors").config["transformer"]
        names = text_connectors_blueprint(config, num_text_states=5).names
        kinds[folder] = sorted(name for name in names if name.startswith("text_embedding_projection."))
    assert kinds["text_connectors_ltx2_0"] == ["text_embedding_projection.aggregate_embed.weight"]
    assert kinds["text_connectors_ltx2_3"] == [
        f"text_embedding_projection.{stream}_aggregate_embed.{leaf}"
        for stream in ("audio", "video")
        for leaf in ("bias", "weight")
    ]


@pytest.mark.parametrize("change", [{"caption_proj_input_norm": True}, {"caption_proj_before_connector": None}])
def test_projection_of_an_unknown_kind_is_refused(fixtures, change):
    config = CheckpointFile(fixtures / "text_connectors_ltx2_3/model.safetensors").config["transformer"] | change
    with pytest.raises(CheckpointMismatch, match="text projection"):
        text_connectors_blueprint(config, num_text_states=5)


def test_absent_projection_is_named(fixtures, tmp_path):
    source = fixtures / "text_connectors_ltx2_3/model.safetensors"
    tensors = load_file(source)
    del tensors["text_embedding_projection.video_aggregate_embed.weight"]
    save_file(tensors, tmp_path / "less.safetensors", {"config": json.dumps(CheckpointFile(source).config)})
    with pytest.raises(CheckpointMismatch, match=r"video_aggregate_embed\.weight"):
        load_text_connectors(CheckpointFile(tmp_path / "less.safetensors"), device="cpu", dtype=None)


def test_ltxv_hands_on_what_the_encoder_says_and_the_mask(fixtures, tmp_path):
    published = json.loads((fixtures / "inventory" / "ltxv-2b-0.9.8-distilled.json").read_text())
    metadata = {"config": json.dumps(published["metadata"]["config"])}
    save_file({"unused": torch.zeros(1)}, tmp_path / "ltxv.safetensors", metadata)
    connectors = load_text_connectors(CheckpointFile(tmp_path / "ltxv.safetensors"), device="cpu", dtype=None)
    states = TextStates(torch.randn(1, 8, 4, 1), torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]))
    context = connectors.connect(states)
    assert torch.equal(context.video_BSD, states.hidden_BSDL[..., 0])
    assert context.audio_BSD is None
    assert context.mask_BS is states.mask_BS


def _encoder(folder, max_tokens=128):
    return load_text_encoder(folder, max_tokens=max_tokens, device="cpu", dtype=None)


@pytest.fixture
def gemma(nano_folder):
    return _encoder(nano_folder / "gemma-nano")


@pytest.fixture
def gemma_copy(nano_folder, tmp_path):
    shutil.copytree(nano_folder / "gemma-nano", tmp_path / "gemma")
    return tmp_path / "gemma"


def test_gemma_pads_on_the_left_and_gives_every_hidden_state(gemma):
    states = gemma.encode(["a red fox", "  a red fox \n"])
    assert states.hidden_BSDL.shape == (2, 128, 48, 4)
    assert torch.isfinite(states.hidden_BSDL).all()
    used = int(states.mask_BS[0].sum())
    assert 1 < used < 128
    assert states.mask_BS[0].tolist() == [0] * (128 - used) + [1] * used
    assert torch.equal(states.hidden_BSDL[0], states.hidden_BSDL[1]), "spaces around a prompt must not matter"


def test_prompt_longer_than_the_limit_is_cut(gemma):
    states = gemma.encode(["fox " * 500])
    assert states.hidden_BSDL.shape[1] == 128
    assert states.mask_BS.all()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_gemma_folder_is_refused_in_one_line(gemma_copy, name):
    (gemma_copy / name).unlink()
    with pytest.raises(UsageError, match="text encoder folder") as refusal:
        _encoder(gemma_copy)
    assert "\n" not in str(refusal.value)


def test_absent_text_encoder_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere lacks config\.json"):
        _encoder(tmp_path / "nowhere")


def test_gemma_with_missing_tensors_is_refused(gemma_copy):
    tensors = load_file(gemma_copy / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, gemma_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"norm\.weight"):
        _encoder(gemma_copy)


def test_broken_gemma_weights_are_refused(gemma_copy):
    whole = (gemma_copy / "model.safetensors").read_bytes()
    (gemma_copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="text encoder folder"):
        _encoder(gemma_copy)


def _sharded(file):
    """The same tensors in two files with an index, and a third that the index does not name."""
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, file.with_name(part), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file.with_name("other.safetensors"))
    file.unlink()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kind", ["gemma", "t5"])
def test_weights_for_a_gpu_come_from_the_files_by_the_pinned_reader(request, monkeypatch, kind, is_sharded):
    folder = request.getfixturevalue("gemma_copy" if kind == "gemma" else "t5_folder")
    weights, prefix = (folder, "language_model.model.") if kind == "gemma" else (folder / "text_encoder", "")
    if is_sharded:
        _sharded(weights / "model.safetensors")
    encoder, expected = _encoder(folder), _encoder(folder)
    # For a machine without a GPU; what is not in the files stays where the library put it.
    monkeypatch.setattr(checkpoint, "PinnedReader", lambda path, device: PinnedReader(path, "cpu", buffer_bytes=4096))
    module = encoder.module.model if kind == "gemma" else encoder.module
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    fill_from_files(module, weights, prefix, "cuda")
    assert all(parameter.data_ptr() != before[name] for name, parameter in module.named_parameters()), "every one"
    stored, wanted = encoder.module.state_dict(), expected.module.state_dict()
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    states = encoder.encode(["a red fox"]).hidden_BSDL
    assert torch.equal(states, expected.encode(["a red fox"]).hidden_BSDL)
    if kind == "gemma":
        assert encoder.module.lm_head.weight is module.embed_tokens.weight


def test_text_length_must_suit_the_registers(nano_folder):
    with pytest.raises(UsageError, match="multiple of 128, got 100"):
        _encoder(nano_folder / "gemma-nano", max_tokens=100)


# Four bits compile an extension at first, which takes half a minute.
@pytest.mark.parametrize(
    ("bits", "least_likeness", "bytes_a_weight"), [(8, 0.999, 1.15), pytest.param(4, 0.98, 0.7, marks=pytest.mark.long)]
)
def test_text_encoder_in_few_bits_is_smaller_and_says_nearly_the_same(
    nano_folder, bits, least_likeness, bytes_a_weight
):
    pytest.importorskip("optimum.quanto", reason="optional")
    settings = {"max_tokens": 128, "device": "cpu", "dtype": torch.bfloat16}
    whole = load_text_encoder(nano_folder / "gemma-nano", **settings)
    small = load_text_encoder(nano_folder / "gemma-nano", **settings, bits=bits)
    with torch.inference_mode():
        expected, actual = (encoder.encode(["a red fox"]).hidden_BSDL.float().flatten() for encoder in (whole, small))
    assert torch.cosine_similarity(actual, expected, dim=0) > least_likeness
    assert not torch.equal(actual, expected)
    weights = [layer.weight for layer in small._writer.model.modules() if type(layer).__name__ == "QLinear"]
    assert sum(map(_bytes, weights)) / sum(weight.numel() for weight in weights) < bytes_a_weight
    assert small.rewrite("x", "y", seed=1, max_new_tokens=3)


def _bytes(tensor):
    """Of a tensor, or of the tensors that a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def test_few_bits_without_the_library_are_refused_with_a_way_out(nano_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(UsageError, match=r"pip install optimum-quanto"):
        load_text_encoder(nano_folder / "gemma-nano", max_tokens=128, device="cpu", dtype=None, bits=8)


def test_other_numbers_of_bits_are_refused(nano_folder):
    with pytest.raises(UsageError, match="16, 8 or 4 bits, got 6"):
        load_text_encoder(nano_folder / "gemma-nano", max_tokens=128, device="cpu", dtype=None, bits=6)


def _rewritten(encoder, **settings):
    defaults = {"seed": 1, "max_new_tokens": 12, "temperature": 0.7}
    return encoder.rewrite(REWRITE_INSTRUCTIONS, "a red fox", **(defaults | settings))


def test_rewriting_follows_the_seed_and_leaves_other_random_numbers_alone(gemma):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    text = _rewritten(gemma)
    assert torch.rand(1) == expected
    assert text == _rewritten(gemma)
    assert text != _rewritten(gemma, seed=2)
    assert "\n" not in text


def test_rewriting_without_temperature_does_not_draw(gemma):
    assert _rewritten(gemma, temperature=0, seed=1) == _rewritten(gemma, temperature=0, seed=2)


def test_rewriting_writes_with_the_weights_that_encode(gemma, nano_folder):
    """The first greedy word is the one whose embedding is nearest to the last hidden state of the last token."""
    words = gemma._tokenizer("<bos>x\nIdea: y\nParagraph:", return_tensors="pt", add_special_tokens=False)
    state = gemma._read(words.input_ids, words.attention_mask)[0, -1, :, -1]
    embedding = load_file(nano_folder / "gemma-nano/model.safetensors")["language_model.model.embed_tokens.weight"]
    likeliest = gemma._tokenizer.decode((embedding @ state).argmax(), skip_special_tokens=True)
    assert gemma.rewrite("x", "y", seed=1, max_new_tokens=1, temperature=0) == " ".join(likeliest.split())


def test_conversation_follows_the_tokenizers_own_template(gemma_copy):
    settings = json.loads((gemma_copy / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    (gemma_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = _encoder(gemma_copy)
    assert encoder._conversation("do this", "a fox") == "<bos>[system]do this[user]a fox>"


def test_rewriting_that_yields_nothing_keeps_the_prompt(gemma, monkeypatch):
    monkeypatch.setattr(gemma._writer, "generate", lambda ids, **_: torch.cat((ids, torch.ones(1, 1).long()), dim=1))
    assert _rewritten(gemma) == "a red fox"


def test_instructions_ask_for_what_the_models_were_trained_on():
    for word in ("paragraph", "order", "camera", "light", "sound", "double quotes", "fact"):
        assert word in REWRITE_INSTRUCTIONS


def _message(*fields):
    """A protocol-buffers message; texts and bytes by length, floats in four bytes."""
    data = b""
    for number, value in fields:
        if isinstance(value, float):
            data += bytes([number << 3 | 5]) + struct.pack("<f", value)
        elif isinstance(value, int):
            data += bytes([number << 3, value])
        else:
            value = value.encode() if isinstance(value, str) else value
            size = len(value)
            data += bytes([number << 3 | 2]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
            data += value
    return data


PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁fox", "fo", "x", "r", "e", "d"]


@pytest.fixture
def t5_folder(tmp_path):
    """The layout of the published folder: `text_encoder`, and `tokenizer` with nothing but a sentencepiece model."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5/text_encoder")
    (tmp_path / "t5/tokenizer").mkdir()
    pieces = [(1, _message((1, piece), (2, -float(i)), (3, 1))) for i, piece in enumerate(PIECES)]
    trained_by = (2, _message((1, "corpus" * 30)))
    (tmp_path / "t5/tokenizer/spiece.model").write_bytes(_message(*pieces, trained_by, (3, _message((1, "identity")))))
    return tmp_path / "t5"


def test_t5_gives_its_last_state_and_the_mask(t5_folder):
    states = _encoder(t5_folder, max_tokens=16).encode(["a red fox", " a fox\n"])
    ids = [PIECES.index(piece) for piece in ("▁a", "▁red", "▁fox", "</s>")]
    model = T5EncoderModel.from_pretrained(t5_folder / "text_encoder").eval()
    mask = torch.tensor([[1] * 4 + [0] * 12])
    expected = model(input_ids=torch.tensor([ids + [0] * 12]), attention_mask=mask).last_hidden_state
    assert torch.equal(states.mask_BS[:1], mask)
    assert states.mask_BS[1].sum() == 3
    assert states.hidden_BSDL.shape == (2, 16, 16, 1)
    assert torch.allclose(states.hidden_BSDL[:1, ..., 0], expected, atol=1e-6)


def test_t5_cuts_long_prompts_but_keeps_the_end_token(t5_folder):
    encoder = _encoder(t5_folder, max_tokens=16)
    assert encoder.encode(["fox " * 50]).mask_BS.all()
    ids = encoder._tokenizer("fox " * 50, max_length=16, truncation=True).input_ids
    assert ids[-1] == PIECES.index("</s>")


def test_t5_cannot_rewrite(t5_folder):
    with pytest.raises(UsageError, match="only Gemma can"):
        _rewritten(_encoder(t5_folder, max_tokens=16))


@pytest.mark.parametrize(
    "name", ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/spiece.model"]
)
def test_incomplete_t5_folder_is_refused(t5_folder, name):
    (t5_folder / name).unlink()
    with pytest.raises(UsageError, match="text encoder folder"):
        _encoder(t5_folder, max_tokens=16)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\x01", b"\x0b"])
def test_broken_sentencepiece_model_is_refused(t5_folder, content):
    (t5_folder / "tokenizer/spiece.model").write_bytes(content)
    with pytest.raises(UsageError, match="must be a sentencepiece model"):
        _encoder(t5_folder, max_tokens=16)
