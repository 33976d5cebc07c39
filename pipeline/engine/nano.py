"""Builds the nano model: the whole LTX-2.0 stack at toy width, in the published file layout, from fixed seeds.

The weights are random, but shaped so that clips are worth looking at: soft coloured shapes that move, differ by
prompt and seed, and come with sound. Names and sizes of tensors come from the parts themselves where those exist, so
that nano files load through the same code as published ones.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.engine.components.blueprint import Blueprint
from pipeline.engine.components.parts import part_blueprints
from pipeline.engine.components.upsampler import latent_upsampler_blueprint
from pipeline.model.checkpoint import build_on_meta, name_on_disk
from pipeline.model.hparams import DenoiserHparams

CHECKPOINT = "nano.safetensors"
TEXT_ENCODER = "gemma-nano"
SPATIAL_UPSCALER = "nano-spatial-upscaler-x2.safetensors"
DISTILLED_ADAPTER = "nano-distilled-lora.safetensors"
CAMERA_ADAPTER = "nano-lora-camera-control-dolly-in.safetensors"
ADAPTER_RANK = 4
# Of sixteen tried, the one whose prompts differ most in colour.
SEED = 20261128

# Metadata as published files carry it, with small numbers.
CONFIG: dict[str, Any] = json.loads("""
{
 "transformer": {
  "_class_name": "AVTransformer3DModel", "_diffusers_version": "0.25.1", "activation_fn": "gelu-approximate",
  "attention_bias": true, "attention_head_dim": 16, "attention_type": "default", "caption_channels": 48,
  "cross_attention_dim": 64, "double_self_attention": false, "dropout": 0.0, "in_channels": 16,
  "norm_elementwise_affine": false, "norm_eps": 1e-06, "norm_num_groups": 32, "num_attention_heads": 4,
  "num_embeds_ada_norm": 1000, "num_layers": 2, "num_vector_embeds": null, "only_cross_attention": false,
  "cross_attention_norm": true, "out_channels": 16, "upcast_attention": false, "use_linear_projection": false,
  "qk_norm": "rms_norm", "standardization_norm": "rms_norm", "positional_embedding_type": "rope",
  "positional_embedding_theta": 10000.0, "positional_embedding_max_pos": [20, 2048, 2048],
  "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000.0, "causal_temporal_positioning": true,
  "audio_num_attention_heads": 4, "audio_attention_head_dim": 8, "use_audio_video_cross_attention": true,
  "share_ff": false, "audio_in_channels": 32, "audio_out_channels": 32, "audio_cross_attention_dim": 32,
  "audio_positional_embedding_max_pos": [20], "av_cross_ada_norm": true, "use_embeddings_connector": true,
  "connector_attention_head_dim": 16, "connector_num_attention_heads": 3, "connector_num_layers": 2,
  "connector_positional_embedding_max_pos": [4096], "connector_num_learnable_registers": 128,
  "connector_norm_output": true, "use_middle_indices_grid": true, "rope_type": "split",
  "frequencies_precision": "float64"},
 "vae": {
  "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 16,
  "encoder_blocks": [
   ["res_x", {"num_layers": 1}], ["compress_space_res", {"multiplier": 1}], ["res_x", {"num_layers": 1}],
   ["compress_time_res", {"multiplier": 1}], ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 1}],
   ["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 1}], ["res_x", {"num_layers": 1}]],
  "decoder_blocks": [
   ["res_x", {"num_layers": 1, "inject_noise": false}], ["compress_all", {"residual": true, "multiplier": 2}],
   ["res_x", {"num_layers": 1, "inject_noise": false}], ["compress_all", {"residual": true, "multiplier": 2}],
   ["res_x", {"num_layers": 1, "inject_noise": false}], ["compress_all", {"residual": true, "multiplier": 2}],
   ["res_x", {"num_layers": 1, "inject_noise": false}]],
  "scaling_factor": 1.0, "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform",
  "use_quant_conv": false, "causal_decoder": false, "timestep_conditioning": false,
  "normalize_latent_channels": false, "encoder_base_channels": 8, "decoder_base_channels": 4,
  "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "reflect"},
 "scheduler": {
  "_class_name": "RectifiedFlowScheduler", "_diffusers_version": "0.25.1", "num_train_timesteps": 1000,
  "shifting": null, "base_resolution": null, "sampler": "LinearQuadratic"},
 "audio_vae": {
  "model": {"params": {"ddconfig": {
    "double_z": true, "mel_bins": 64, "z_channels": 2, "resolution": 256, "downsample_time": false, "in_channels": 2,
    "out_ch": 2, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    "mid_block_add_attention": false, "norm_type": "pixel", "causality_axis": "height"},
    "sampling_rate": 16000}},
  "preprocessing": {
   "audio": {"sampling_rate": 16000, "max_wav_value": 32768.0, "duration": 5.12, "stereo": true, "causal_padding": 3},
   "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": true},
   "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000}}},
 "vocoder": {
  "upsample_initial_channel": 64, "resblock": "1", "upsample_rates": [6, 5, 2, 2, 2],
  "resblock_kernel_sizes": [3, 5], "upsample_kernel_sizes": [16, 15, 8, 4, 4],
  "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]], "stereo": true}
}
""")
UPSCALER_CONFIG: dict[str, Any] = json.loads("""
{
 "_class_name": "LatentUpsampler", "in_channels": 16, "mid_channels": 64, "num_blocks_per_stage": 1, "dims": 3,
 "spatial_upsample": true, "temporal_upsample": false, "spatial_scale": 2.0, "rational_resampler": true
}
""")
TEXT_ENCODER_CONFIG: dict[str, Any] = json.loads("""
{
 "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 5,
 "eoi_token_index": 6, "eos_token_id": 1, "image_token_index": 7, "initializer_range": 0.02, "mm_tokens_per_image": 4,
 "torch_dtype": "float32",
 "text_config": {
  "model_type": "gemma3_text", "vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
  "max_position_embeddings": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 64},
 "vision_config": {
  "model_type": "siglip_vision_model", "hidden_size": 16, "image_size": 28, "intermediate_size": 32,
  "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14, "vision_use_head": false}
}
""")
NUM_TEXT_STATES = TEXT_ENCODER_CONFIG["text_config"]["num_hidden_layers"] + 1

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
# What the tokenizer learns its words from; anything else falls back to pieces and bytes.
CORPUS = """
a slow pan over a quiet harbour at dawn while fishing boats rock gently and gulls cry above the water
close up of rain running down a window at night with neon city lights glowing behind the glass
a red fox walks through deep snow in a pine forest, soft light, shallow depth of field, cinematic
an old man plays the violin on a wooden stage as the camera moves slowly around him, warm light
waves crash on black rocks under a stormy sky, spray in the air, wide shot, slow motion, deep blue
a child runs with a yellow kite across a green field in the wind, bright summer day, handheld camera
macro shot of a bee landing on a purple flower, humming wings, golden morning sun, colourful
a train crosses a bridge over a misty valley, steam rising, birds singing, aerial drone view
two people talk and laugh in a small cafe, cups clinking, quiet music, natural sound, close up
the camera flies between tall buildings at sunset, orange clouds reflected in glass, city noise
"""


def build_nano(folder: Path) -> None:
    """Write the parts of the nano model that `folder` lacks; what is there is never touched. The same bytes every time.

    Each part appears whole or not at all; of two builders at once, one wins each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".nano-", dir=folder))
    try:
        metadata = {"config": json.dumps(CONFIG), "model_version": "2.0.0"}
        _write_safetensors(staging / CHECKPOINT, _drawn(_checkpoint_shapes(), seed=SEED), metadata)
        upscaler = _drawn(_shapes(latent_upsampler_blueprint(UPSCALER_CONFIG)), seed=SEED + 1)
        _write_safetensors(staging / SPATIAL_UPSCALER, upscaler, {"config": json.dumps(UPSCALER_CONFIG)})
        for index, name in enumerate((DISTILLED_ADAPTER, CAMERA_ADAPTER)):
            _write_safetensors(staging / name, _drawn(_adapter_shapes(), seed=SEED + 3 + index), {"format": "pt"})
        _write_text_encoder(staging / TEXT_ENCODER)
        for name in (CHECKPOINT, SPATIAL_UPSCALER, DISTILLED_ADAPTER, CAMERA_ADAPTER, TEXT_ENCODER):
            if not (folder / name).exists():
                with suppress(FileExistsError, NotADirectoryError):  # another builder was first
                    (staging / name).rename(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the single file by its published name."""
    denoiser = build_on_meta(DenoiserHparams.from_config(CONFIG["transformer"]), reference_ops())
    shapes = {name_on_disk(name): tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    for plan in part_blueprints(CONFIG, num_text_states=NUM_TEXT_STATES):
        shapes |= _shapes(plan)
    return shapes


def _adapter_shapes() -> dict[str, tuple[int, ...]]:
    """Pairs of factors for the query projections of every block, as published adapters name them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in ((n, s) for n, s in _checkpoint_shapes().items() if re.search(r"blocks.*to_q\.w", n)):
        if "connector" not in name:
            module = name.removeprefix("model.").removesuffix(".weight")
            shapes[f"{module}.lora_A.weight"] = (ADAPTER_RANK, columns)
            shapes[f"{module}.lora_B.weight"] = (rows, ADAPTER_RANK)
    return shapes


def _shapes(plan: Blueprint) -> dict[str, tuple[int, ...]]:
    tensors = plan.module.state_dict()
    return {on_disk: tuple(tensors[name].shape) for on_disk, name in plan.names.items()}


def _with_biases(weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def _text_encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Gemma 3 as its published folders name it."""
    text, vision = TEXT_ENCODER_CONFIG["text_config"], TEXT_ENCODER_CONFIG["vision_config"]
    width, inner, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    queries, keys = head * text["num_attention_heads"], head * text["num_key_value_heads"]
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    language: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (text["vocab_size"], width), "norm.weight": (width,)}
    for index in range(text["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            **{"self_attn.q_proj": (queries, width), "self_attn.o_proj": (width, queries)},
            **{"self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width)},
            **{"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)},
            **{"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)},
            **{f"{norm}_layernorm": (width,) for norm in norms},
        }
        language |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    seen, patch = vision["hidden_size"], vision["patch_size"]
    linear: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (seen, seen) for name in "qkv"} | {
        "self_attn.out_proj": (seen, seen)
    }
    linear |= {"mlp.fc1": (vision["intermediate_size"], seen), "mlp.fc2": (seen, vision["intermediate_size"])}
    linear |= {"layer_norm1": (seen,), "layer_norm2": (seen,)}
    tower = _with_biases({f"encoder.layers.0.{name}": shape for name, shape in linear.items()})
    tower |= _with_biases({"embeddings.patch_embedding": (seen, 3, patch, patch), "post_layernorm": (seen,)})
    tower["embeddings.position_embedding.weight"] = ((vision["image_size"] // patch) ** 2, seen)
    return {
        **{f"language_model.model.{name}": shape for name, shape in language.items()},
        **{f"vision_tower.vision_model.{name}": shape for name, shape in tower.items()},
        "multi_modal_projector.mm_input_projection_weight": (seen, width),
        "multi_modal_projector.mm_soft_emb_norm.weight": (seen,),
    }


# Called with a shape: zero mean, unit variance.
Draw = Callable[..., Tensor]

# Start from a spread of 1 / sqrt(fan-in), times the first of these whose pattern is in the name. Found by looking:
# what a prompt says must outweigh what all prompts share, and noise must come through as shapes.
_GAINS = {
    r"connector.*to_(v|out)": 2.5,
    r"connector.*ff": 0.3,
    r"caption_projection": 2.0,
    r"attn2\.to_out": 2.0,
    r"(audio_to_video|video_to_audio)_attn\.to_out": 0.3,
    r"adaln_single\.": 0.1,
    r"ff\.net\.2": 0.2,
    r"proj_out\.weight": 0.4,
    r"vae\.decoder\.conv_in": 1.5,
    r"vae\.decoder\.conv_out": 1.2,
    r"vocoder\.conv_pre": 2.0,
    r"vocoder\.conv_post": 1.2,
}
# Rows that gate a branch, by the number of rows in the table.
_GATE_ROWS = {6: [2, 5], 5: [4], 2: []}


def _drawn(shapes: dict[str, tuple[int, ...]], *, seed: int) -> dict[str, Tensor]:
    """A value for every tensor, drawn in the order of names. Only exactly rounded operations, so all CPUs agree."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) - 0.5) * math.sqrt(12)

    return {name: _value(name, shapes[name], draw) for name in sorted(shapes)}


def _value(name: str, shape: tuple[int, ...], draw: Draw) -> Tensor:
    gain = next((gain for pattern, gain in _GAINS.items() if re.search(pattern, name)), 1.0)
    if name.endswith("blur_down.kernel"):
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
        return (row[:, None] * row / 256)[None, None]
    if re.search(r"norm\d?(\.weight)?$", name.removesuffix(".weight")) and len(shape) == 1:
        # Gemma adds one to what is stored, all others store the factor itself.
        return torch.zeros(shape) if name.startswith(("language_model.", "multi_modal")) else torch.ones(shape)
    if name.endswith("std-of-means"):
        return draw(*shape) * 0.1 + 1.0
    if "table" in name:
        rows = draw(*shape) * 0.1
        rows[_GATE_ROWS[shape[0]]] += 1.0
        return rows
    if name.endswith((".bias", "mean-of-means", "registers")):
        # A constant in the vocoder would be a steady hum under every clip.
        return draw(*shape) * (0.0 if name.startswith("vocoder.") else 0.02)
    if name.endswith("patchify_proj.weight"):
        return torch.eye(shape[1]).repeat(shape[0] // shape[1], 1) * 0.5 + draw(*shape) * 0.1
    if name.startswith("vae.decoder."):
        return _smooth_convolution(name, shape, draw) * gain
    if re.match(r"vocoder\.ups\.[2-9]", name):
        # Rising and falling weights: the tone is made by the layers before, these only draw it smoothly.
        taps = torch.tensor([min(tap + 1, shape[2] - tap) for tap in range(shape[2])]) * (2 / shape[2])
        return draw(shape[0], shape[1], 1) * taps / math.sqrt(shape[0])
    weight = draw(*shape) * (gain / math.sqrt(math.prod(shape[1:])))
    if re.match(r"audio_vae\.decoder\.(?!conv_in)|vocoder\.(resblocks|conv_post)", name):
        weight -= weight.mean(dim=1, keepdim=True)
    return weight


def _smooth_convolution(name: str, shape: tuple[int, ...], draw: Draw) -> Tensor:
    """A channel mixing spread over space: blurs, or interpolates where the channels are unfolded into pixels."""
    is_last, upsamples = "conv_out" in name, re.search(r"up_blocks\.\d+\.conv\.", name) is not None
    factors = (2, 2, 2) if upsamples else (1, 4, 4) if is_last else (1, 1, 1)
    num_parts = math.prod(factors)
    num_out, num_in = shape[0] // num_parts, shape[1]
    if "res_blocks" in name:
        # Inputs from an activation are mostly positive: rows of zero sum keep that from drowning the rest.
        mixing = draw(num_out, num_in) / math.sqrt(num_in)
        mixing = mixing - mixing.mean(dim=1, keepdim=True)
    else:
        # Orthogonal rows: of random ones a single direction soon wins, and the picture has two colours. The first row
        # of the matrix sums its inputs, so after an activation it is left out.
        size = max(num_out + is_last, num_in)
        mixing = _hadamard(size)[is_last : num_out + is_last, :num_in] / math.sqrt(size)
        mixing = mixing if is_last else mixing * draw(1, num_in).sign()
    kernel = torch.einsum("ai,bj,ck->abcijk", *(_taps(factor) for factor in factors))
    # Sub-pixels are packed as (time, height, width) by upsamplers and as (time, width, height) by the last layer.
    kernel = (kernel.transpose(1, 2) if is_last else kernel).flatten(0, 2)
    weight = torch.einsum("oi,pdhw->opidhw", mixing, kernel)
    if upsamples:
        # The layer adds its own input, unfolded into pixels: a raster, if the convolution did not take it away again.
        for out in range(num_out):
            for part in range(num_parts):
                weight[out, part, out * num_parts % num_in + part, 1, 1, 1] -= 1.0
    return weight.reshape(shape)


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _taps(factor: int) -> Tensor:
    """Weights of the previous, this and the next cell for each of the `factor` parts that a cell becomes."""
    if factor == 1:
        return torch.tensor([[0.125, 0.75, 0.125]])
    offsets = [(part + 0.5) / factor - 0.5 for part in range(factor)]
    return torch.tensor([[max(-d, 0.0), 1 - abs(d), max(d, 0.0)] for d in offsets])


def _write_text_encoder(folder: Path) -> None:
    _write_safetensors(folder / "model.safetensors", _drawn(_text_encoder_shapes(), seed=SEED + 2), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(TEXT_ENCODER_CONFIG, indent=2))
    (folder / "tokenizer.json").write_text(_trained_tokenizer().to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        **{f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS[:5]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _trained_tokenizer() -> Tokenizer:
    """BPE over CORPUS in Gemma's manner: spaces as part of words, bytes for what has no piece."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fixed = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab_size = TEXT_ENCODER_CONFIG["text_config"]["vocab_size"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(fixed), show_progress=False)
    learner.train_from_iterator(CORPUS.strip().splitlines(), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = fixed + sorted(learned["vocab"], key=learned["vocab"].get)

    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The safetensors format by hand: the library writes the metadata's keys in another order each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().astype("<f4").tobytes())
