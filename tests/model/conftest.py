"""Golden cases of the denoiser as values: tiny models in the published format, recorded inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.streams import DistinctTimesteps, Perturbation, TokenStream

FIXTURES = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """One recorded call: `video` and `audio` go in, `expected` holds every out.* and mid.* tensor."""

    video: TokenStream | None
    audio: TokenStream | None
    perturbations: tuple[Perturbation, ...] | None
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def av_denoiser() -> AudioVideoDenoiser:
    return load_denoiser(CheckpointFile(FIXTURES / "dit_ltx2_0" / "model.safetensors"), reference_ops(), "cpu")


@pytest.fixture(scope="session")
def video_only_denoiser() -> AudioVideoDenoiser:
    path = FIXTURES / "dit_ltx2_0_video_model" / "model.safetensors"
    return load_denoiser(CheckpointFile(path), reference_ops(), "cpu")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], GoldenCase]:
    """Reads the case of a name such as dit_ltx2_0/case_t2v."""
    return _read_case


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.inference_mode():
        yield


def _read_case(name: str) -> GoldenCase:
    with safe_open(str(FIXTURES / f"{name}.safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        params = json.loads(file.metadata()["params"])
    recorded = params.get("perturbations")
    return GoldenCase(
        video=_stream(tensors, "video"),
        audio=_stream(tensors, "audio"),
        perturbations=None if recorded is None else tuple(_perturbation(sample) for sample in recorded),
        expected={key: value for key, value in tensors.items() if not key.startswith("in.")},
    )


def _stream(tensors: dict[str, Tensor], name: str) -> TokenStream | None:
    if f"in.{name}.latent" not in tensors:
        return None
    return TokenStream(
        tokens_BTC=tensors[f"in.{name}.latent"],
        timesteps=DistinctTimesteps.from_tokens(tensors[f"in.{name}.timesteps"].squeeze(-1)),
        sigma_B=tensors[f"in.{name}.sigma"],
        positions_BAT2=tensors[f"in.{name}.positions"],
        text_BSD=tensors[f"in.{name}.context"],
        text_mask_BS=tensors.get(f"in.{name}.context_mask"),
        attention_mask_BTT=tensors.get(f"in.{name}.attention_mask"),
    )


def _perturbation(sample: list[list]) -> Perturbation:
    """From the recorded pairs of kind and blocks (None: all blocks)."""
    blocks = dict(sample)
    isolated = {"SKIP_A2V_CROSS_ATTN", "SKIP_V2A_CROSS_ATTN"}
    assert isolated & blocks.keys() in (set(), isolated)
    return Perturbation(
        video_self_attention=frozenset(blocks.get("SKIP_VIDEO_SELF_ATTN", ())),
        audio_self_attention=frozenset(blocks.get("SKIP_AUDIO_SELF_ATTN", ())),
        isolate_streams=isolated <= blocks.keys(),
    )
