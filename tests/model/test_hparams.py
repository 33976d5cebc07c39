"""Hyper-parameters come from the checkpoint's metadata; what this version cannot compute is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointMismatch
from pipeline.model.hparams import DenoiserHparams, RotaryHparams, StreamHparams


@pytest.fixture
def section(fixtures: Path) -> dict[str, Any]:
    """The published section of the 19B model."""
    return published(fixtures, "ltx-2-19b-dev")


def published(fixtures: Path, name: str) -> dict[str, Any]:
    inventory = json.loads((fixtures / "inventory" / f"{name}.json").read_text())
    return inventory["metadata"]["config"]["transformer"]


def test_published_19b_metadata_gives_the_published_sizes(section: dict[str, Any]) -> None:
    assert DenoiserHparams.from_config(section) == DenoiserHparams(
        num_layers=48,
        video=StreamHparams(128, 128, num_heads=32, head_dim=128, max_positions=(20, 2048, 2048)),
        audio=StreamHparams(128, 128, num_heads=32, head_dim=64, max_positions=(20,)),
        text_channels=3840,
        norm_eps=1e-6,
        qk_norm_eps=1e-6,
        rotary=RotaryHparams(theta=10000.0),
        timestep_scale=1000.0,
        exchange_gate_timestep_scale=1000.0,
    )


def test_video_only_metadata_needs_no_audio_sizes(section: dict[str, Any]) -> None:
    video_section = {key: value for key, value in section.items() if not key.startswith(("audio_", "av_ca_"))}
    assert DenoiserHparams.from_config(video_section, has_audio=False).audio is None
    with pytest.raises(CheckpointMismatch, match="missing: audio_attention_head_dim, audio_cross_attention_dim"):
        DenoiserHparams.from_config(video_section)


def test_every_missing_key_and_unknown_feature_is_named_in_one_error(section: dict[str, Any]) -> None:
    section |= {"apply_gated_attention": 1, "moe": True, "rope_type": "interleaved", "frequencies_precision": "float32"}
    del section["num_layers"], section["norm_eps"]
    with pytest.raises(CheckpointMismatch) as caught:
        DenoiserHparams.from_config(section, source="big.safetensors: metadata config")
    assert str(caught.value) == (
        "big.safetensors: metadata config: section 'transformer' must describe an LTX-2 or LTX-Video denoiser, got "
        "missing: norm_eps, num_layers; not supported: apply_gated_attention=1, frequencies_precision='float32', "
        "moe=True, rope_type='interleaved'; use a published file"
    )


def test_published_22b_metadata_turns_its_features_on(fixtures: Path, section: dict[str, Any]) -> None:
    assert DenoiserHparams.from_config(published(fixtures, "ltx-2.3-22b-dev")) == replace(
        DenoiserHparams.from_config(section), text_channels=None, gated_attention=True, text_modulation=True
    )


def test_2_5_metadata_takes_the_bias_from_video_only_and_brings_a_keyframe_marker(section: dict[str, Any]) -> None:
    plain = DenoiserHparams.from_config(section)
    got = DenoiserHparams.from_config(section | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True})
    assert got == replace(plain, video=replace(plain.video, feed_forward_bias=False, keyframe_marker=True))
    assert got.audio.feed_forward_bias and not got.audio.keyframe_marker


@pytest.mark.parametrize(
    ("name", "num_layers", "head_dim"), [("ltxv-13b-0.9.8-dev", 48, 128), ("ltxv-2b-0.9.8-distilled", 28, 64)]
)
def test_published_ltx_video_metadata_gives_its_sizes_and_rules(
    name: str, num_layers: int, head_dim: int, fixtures: Path
) -> None:
    assert DenoiserHparams.from_config(published(fixtures, name)) == DenoiserHparams(
        num_layers=num_layers,
        video=StreamHparams(128, 128, num_heads=32, head_dim=head_dim, max_positions=(20, 2048, 2048)),
        audio=None,
        text_channels=4096,
        norm_eps=1e-6,
        qk_norm_eps=1e-5,
        rotary=RotaryHparams(theta=10000.0, interleaved=True, at_start=True, float64_grid=False),
        timestep_scale=1000.0,
        exchange_gate_timestep_scale=1.0,
        text_query_norm=False,
        hidden_text_bias=-10000.0,
    )


@pytest.mark.parametrize("key", ["apply_gated_attention", "av_cross_ada_norm", "caption_proj_before_connector"])
def test_keys_of_ltx_2_are_refused_of_ltx_video(key: str, fixtures: Path) -> None:
    section = published(fixtures, "ltxv-2b-0.9.8-distilled")
    with pytest.raises(CheckpointMismatch, match=f"not supported: {key}=True"):
        DenoiserHparams.from_config(section | {key: True})


def test_half_a_text_projection_is_refused(fixtures: Path) -> None:
    section = published(fixtures, "ltx-2.3-22b-dev") | {"caption_projection_second_linear": True}
    del section["caption_proj_input_norm"]
    with pytest.raises(CheckpointMismatch) as caught:
        DenoiserHparams.from_config(section)
    assert "missing: caption_proj_input_norm; not supported: caption_projection_second_linear=True" in str(caught.value)


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", None])
def test_another_class_of_denoiser_is_refused_by_name(name: str | None, section: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch, match=f"_class_name={name!r}, which must be one of"):
        DenoiserHparams.from_config(section | {"_class_name": name})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", "48"),
        ("num_layers", 0),
        ("num_layers", 1.5),
        ("norm_eps", True),
        ("positional_embedding_max_pos", [20, 2048]),
        ("positional_embedding_max_pos", 20),
        ("cross_attention_dim", 2048),
        ("audio_in_channels", None),
        ("ff_bias", None),
    ],
)
def test_value_of_the_wrong_kind_is_refused_by_name(key: str, value: object, section: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch, match=f"{key}=") as caught:
        DenoiserHparams.from_config(section | {key: value})
    assert repr(value) in str(caught.value)
