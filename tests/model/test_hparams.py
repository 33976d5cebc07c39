"""Hyper-parameters come from the checkpoint's metadata; what this version cannot compute is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointMismatch
from pipeline.model.hparams import DenoiserHparams, StreamHparams


@pytest.fixture
def section(fixtures: Path) -> dict[str, Any]:
    """The published section of the 19B model."""
    return json.loads((fixtures / "inventory" / "ltx-2-19b-dev.json").read_text())["metadata"]["config"]["transformer"]


def test_published_19b_metadata_gives_the_published_sizes(section: dict[str, Any]) -> None:
    assert DenoiserHparams.from_config(section) == DenoiserHparams(
        num_layers=48,
        video=StreamHparams(128, 128, num_heads=32, head_dim=128, max_positions=(20, 2048, 2048)),
        audio=StreamHparams(128, 128, num_heads=32, head_dim=64, max_positions=(20,)),
        text_channels=3840,
        norm_eps=1e-6,
        rope_theta=10000.0,
        timestep_scale=1000.0,
        exchange_gate_timestep_scale=1000.0,
    )


def test_video_only_metadata_needs_no_audio_sizes(section: dict[str, Any]) -> None:
    video_section = {key: value for key, value in section.items() if not key.startswith(("audio_", "av_ca_"))}
    assert DenoiserHparams.from_config(video_section, has_audio=False).audio is None
    with pytest.raises(CheckpointMismatch, match="missing: audio_attention_head_dim, audio_cross_attention_dim"):
        DenoiserHparams.from_config(video_section)


def test_every_missing_key_and_unknown_feature_is_named_in_one_error(section: dict[str, Any]) -> None:
    section |= {"apply_gated_attention": True, "cross_attention_adaln": True, "rope_type": "interleaved"}
    del section["num_layers"], section["norm_eps"]
    with pytest.raises(CheckpointMismatch) as caught:
        DenoiserHparams.from_config(section, source="big.safetensors: metadata config")
    assert str(caught.value) == (
        "big.safetensors: metadata config: section 'transformer' must describe an LTX-2.0 denoiser, got missing: "
        "norm_eps, num_layers; not supported yet: apply_gated_attention=True, cross_attention_adaln=True, "
        "rope_type='interleaved'; use an ltx-2-19b checkpoint"
    )


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
    ],
)
def test_value_of_the_wrong_kind_is_refused_by_name(key: str, value: object, section: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch, match=f"{key}=") as caught:
        DenoiserHparams.from_config(section | {key: value})
    assert repr(value) in str(caught.value)
