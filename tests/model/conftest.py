"""Golden cases of the denoiser as values: tiny models in the published format, recorded inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kernels.ops import OpSet, reference_ops
from pipeline.model.checkpoint import (
    CheckpointFile,
    build_on_meta,
    denoiser_names,
    fill_module,
    load_denoiser,
    read_hparams,
)
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.streams import DistinctTimesteps, Perturbation, TokenStream

STRATEGIES = {
    "AttentionSkip": "attention",
    "AttentionValues": "values",
    "Residual": "residual",
    "TransformerBlock": "block",
}


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """One recorded call: `video` and `audio` go in, `expected` holds every out.* and mid.* tensor."""

    video: TokenStream | None
    audio: TokenStream | None
    perturbations: tuple[Perturbation, ...] | None
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def load(fixtures) -> Callable[[str], AudioVideoDenoiser]:
    """The float32 denoiser of a golden folder, loaded once."""

    @cache
    def load(folder: str) -> AudioVideoDenoiser:
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        return load_denoiser(checkpoint, reference_ops(), "cpu", torch.float32)

    return load


@pytest.fixture(scope="session")
def load_altered(fixtures) -> Callable[..., AudioVideoDenoiser]:
    """The denoiser of a golden folder with other operations or hyper-parameters than its metadata says."""

    def load(folder: str, ops: OpSet | None = None, **hparams: object) -> AudioVideoDenoiser:
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        denoiser = build_on_meta(replace(read_hparams(checkpoint), **hparams), ops or reference_ops())
        names = denoiser_names(denoiser.state_dict(), checkpoint.tensor_specs())
        fill_module(denoiser, checkpoint, names, device="cpu", dtype=torch.float32, what="the denoiser")
        return denoiser

    return load


@pytest.fixture(scope="session")
def av_denoiser(load) -> AudioVideoDenoiser:
    return load("dit_ltx2_0")


@pytest.fixture(scope="session")
def video_only_denoiser(load) -> AudioVideoDenoiser:
    return load("dit_ltx2_0_video_model")


@pytest.fixture(scope="session")
def golden(fixtures) -> Callable[[str], GoldenCase]:
    """Reads the case of a name such as dit_ltx2_0/case_t2v."""

    def read(name: str) -> GoldenCase:
        folder, case = name.split("/")
        return _read_case(fixtures / folder / f"{case}.safetensors")

    return read


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.inference_mode():
        yield


def _read_case(path: Path) -> GoldenCase:
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        params = json.loads(file.metadata()["params"])
    expected = {key: value for key, value in tensors.items() if not key.startswith("in.")}
    if "in.latent" in tensors:
        perturbations = _ltx_video_perturbations(tensors.get("in.skip_layer_mask"), params)
        return GoldenCase(_ltx_video_stream(tensors), None, perturbations, expected)
    recorded = params.get("perturbations")
    return GoldenCase(
        video=_stream(tensors, "video"),
        audio=_stream(tensors, "audio"),
        perturbations=None if recorded is None else tuple(_perturbation(sample) for sample in recorded),
        expected=expected,
    )


def _stream(tensors: dict[str, Tensor], name: str) -> TokenStream | None:
    if f"in.{name}.latent" not in tensors:
        return None
    keyframes = tensors.get(f"in.{name}.keyframes_mask")
    return TokenStream(
        tokens_BTC=tensors[f"in.{name}.latent"],
        timesteps=DistinctTimesteps.from_tokens(tensors[f"in.{name}.timesteps"].squeeze(-1)),
        sigma_B=tensors[f"in.{name}.sigma"],
        positions_BAT2=tensors[f"in.{name}.positions"],
        text_BSD=tensors[f"in.{name}.context"],
        text_mask_BS=tensors.get(f"in.{name}.context_mask"),
        attention_mask_BTT=tensors.get(f"in.{name}.attention_mask"),
        keyframes_mask_BT=None if keyframes is None else keyframes.squeeze(-1),
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


def _ltx_video_stream(tensors: dict[str, Tensor]) -> TokenStream:
    start_BAT, timesteps_BT = tensors["in.positions"], tensors["in.timesteps"]
    # Where tokens end is not recorded: 32 pixels further; 8 frames later, but the first latent is a single frame.
    extent_BAT = torch.full_like(start_BAT, 32.0)
    extent_BAT[:, 0] = torch.where(start_BAT[:, 0] == 0, 0.04, 0.32)
    return TokenStream(
        tokens_BTC=tensors["in.latent"],
        timesteps=DistinctTimesteps.from_tokens(timesteps_BT),
        sigma_B=timesteps_BT.amax(dim=1),
        positions_BAT2=torch.stack((start_BAT, start_BAT + extent_BAT), dim=-1),
        text_BSD=tensors["in.context"],
        text_mask_BS=tensors["in.context_mask"],
    )


def _ltx_video_perturbations(mask: Tensor | None, params: dict) -> tuple[Perturbation, ...] | None:
    """From the recorded mask of layers and samples, 0 where perturbed."""
    if mask is None:
        return None
    strategy = STRATEGIES[params["skip_layer_strategy"]]
    return tuple(Perturbation(frozenset((column == 0).nonzero().flatten().tolist()), strategy=strategy)
                 for column in mask.unbind(dim=1))  # fmt: skip
