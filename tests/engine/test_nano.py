"""The nano files: the same bytes each time, the published layout, and clips worth looking at."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.engine import nano
from pipeline.engine.components.text_encoder import load_text_encoder
from pipeline.errors import UsageError
from pipeline.model.checkpoint import CheckpointFile
from tests.engine.pictures import rgb_of


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_building_again_gives_the_same_bytes(nano_folder, tmp_path):
    nano.build_nano(tmp_path / "again")
    assert _contents(tmp_path / "again") == _contents(nano_folder)


def test_building_adds_what_is_missing_and_touches_nothing_else(nano_folder, tmp_path):
    folder = tmp_path / "models"
    (folder / nano.TEXT_ENCODER).mkdir(parents=True)
    (folder / nano.TEXT_ENCODER / "config.json").write_text("mine")
    (folder / "ltx.safetensors").write_text("43 GB of somebody's weights")
    nano.build_nano(folder)
    kept = _contents(folder)
    assert kept.pop(Path("ltx.safetensors")) == b"43 GB of somebody's weights"
    assert kept.pop(Path(nano.TEXT_ENCODER) / "config.json") == b"mine"
    built = _contents(nano_folder)
    names = (nano.CHECKPOINT, nano.SPATIAL_UPSCALER, nano.DISTILLED_ADAPTER, nano.CAMERA_ADAPTER)
    assert kept == {Path(name): built[Path(name)] for name in names}


def test_failed_build_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "precious").write_text("kept")

    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr(nano, "_write_text_encoder", fail)
    with pytest.raises(OSError, match="disk full"):
        nano.build_nano(folder)
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_nano_is_small(nano_folder):
    assert sum(len(data) for data in _contents(nano_folder).values()) < 8_000_000


def test_tensor_names_are_those_of_a_published_file_of_this_depth(nano_folder, fixtures):
    # The golden checkpoint went through the official loader; only its vocoder is shallower.
    reference = CheckpointFile(fixtures / "e2e_ltx2_0/checkpoint.safetensors")
    built = CheckpointFile(nano_folder / nano.CHECKPOINT)
    names, expected = built.tensor_specs(), reference.tensor_specs()
    assert {n for n in names if not n.startswith("vocoder.")} == {n for n in expected if not n.startswith("vocoder.")}
    for section in ("transformer", "vae", "audio_vae", "vocoder", "scheduler"):
        assert built.config[section].keys() == reference.config[section].keys()
    # The audio VAE has the golden one's sizes too; of the video encoder only the outer ends have.
    assert all(names[name].shape == expected[name].shape for name in names if name.startswith("audio_vae."))
    assert names["vae.encoder.conv_in.conv.weight"].shape[1] == expected["vae.encoder.conv_in.conv.weight"].shape[1]
    assert names["vae.encoder.conv_out.conv.bias"].shape == expected["vae.encoder.conv_out.conv.bias"].shape


def test_library_reads_every_tensor_of_the_files_as_written(nano_folder):
    tensors = load_file(nano_folder / nano.CHECKPOINT)
    specs = CheckpointFile(nano_folder / nano.CHECKPOINT).tensor_specs()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: s.shape for n, s in specs.items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(
    "prompt", ["日本語の海 🎬", "naïve\tcafé\n", "<mask> <image_soft_token> <0x41>", "\u0000\U0010ffff"]
)
def test_any_text_is_a_prompt(nano_folder, prompt):
    encoder = load_text_encoder(nano_folder / nano.TEXT_ENCODER, max_tokens=128, device="cpu", dtype=None)
    states = encoder.encode([prompt])
    assert states.hidden_BSDL.isfinite().all()
    assert states.mask_BS.sum() > 2


def test_tokenizer_gives_text_back_and_knows_its_words(nano_folder):
    tokenizer = nano._trained_tokenizer()
    for text in ("a slow pan over a quiet harbour", "日本語 🎬 x"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert "<unk>" not in tokenizer.encode("日本語 🎬").tokens
    assert len(tokenizer.encode("camera").ids) < len("camera")
    vocab_size = json.loads((nano_folder / "gemma-nano/config.json").read_text())["text_config"]["vocab_size"]
    assert tokenizer.get_vocab_size() <= vocab_size


PROMPTS = ("a red fox walks through deep snow", "waves crash on black rocks under a stormy sky")


def test_clips_are_colourful_moving_audible_and_all_different(engine, recipe, request_for):
    clips = {}
    for prompt in PROMPTS:
        for seed in (1, 2):
            request = request_for(prompt=prompt, seed=seed, width=192, height=128, num_frames=25)
            streams = engine.render(request, recipe, lambda stage: None)
            clips[prompt, seed] = rgb_of(engine, streams).astype(int), streams.waveform
    for frames, waveform in clips.values():
        assert 30 < frames.std() < 110, "neither flat nor black and white"
        assert frames.std(axis=-1).mean() > 20, "coloured"
        assert ((frames == 0) | (frames == 255)).mean() < 0.5, "not burnt out"
        assert np.abs(frames[0] - frames[-1]).mean() > 10, "moving"
        assert 0.1 < np.abs(waveform).max() < 0.6, "audible, not clipping"
        assert waveform.std() > 0.02
        spectrum = np.abs(np.fft.rfft(waveform[0])) ** 2
        hertz = np.fft.rfftfreq(waveform.shape[1], 1 / 24000)
        assert spectrum[hertz > 60].sum() > 0.2 * spectrum.sum(), "not below hearing"
    (first, first_sound), (by_seed, seed_sound) = clips[PROMPTS[0], 1], clips[PROMPTS[0], 2]
    by_prompt, prompt_sound = clips[PROMPTS[1], 1]
    for other, other_sound in ((by_seed, seed_sound), (by_prompt, prompt_sound)):
        assert np.abs(first - other).mean() > 20
        assert np.abs(first_sound - other_sound).max() > 0.02


def test_demo_clip_renders_in_a_few_seconds(engine, recipe, request_for):
    request = request_for(width=192, height=128, num_frames=25)
    started_s = time.process_time()
    list(engine.render(request, recipe, lambda stage: None).frames)
    assert time.process_time() - started_s < 2


def test_upscaler_of_nano_is_of_the_rational_kind(nano_folder):
    file = CheckpointFile(nano_folder / nano.SPATIAL_UPSCALER)
    assert file.config["rational_resampler"] is True
    assert "upsampler.blur_down.kernel" in file.tensor_specs()


def test_folder_of_nano_is_no_text_encoder(nano_folder):
    with pytest.raises(UsageError, match=r"lacks config\.json"):
        load_text_encoder(nano_folder, max_tokens=128, device="cpu", dtype=None)
