"""Golden cases of the denoiser as values: tiny models in the published format, recorded inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

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
from tests.golden import GoldenFolders
from tests.golden_case import GoldenCase

STRATEGIES = {
    "AttentionSkip": "attention",
    "AttentionValues": "values",
    "Residual": "residual",
    "TransformerBlock": "block",
}


class DenoiserCase(GoldenCase):
    """One recorded call of a denoiser: `video`, `audio` and `perturbations` go in."""

    @property
    def video(self) -> TokenStream | None:
        return self._ltx_video_stream() if "in.latent" in self.tensors else self._stream("video")

    @property
    def audio(self) -> TokenStream | None:
        return self._stream("audio")

    @property
    def perturbations(self) -> tuple[Perturbation, ...] | None:
        if "in.skip_layer_mask" in self.tensors:
            strategy = STRATEGIES[self.params["skip_layer_strategy"]]
            skipped = [(kept == 0).nonzero().flatten().tolist() for kept in self["in.skip_layer_mask"].unbind(dim=1)]
            return tuple(Perturbation(frozenset(blocks), strategy=strategy) for blocks in skipped)
        recorded = self.params.get("perturbations")
        return None if recorded is None else tuple(_perturbation(sample) for sample in recorded)

    def _stream(self, name: str) -> TokenStream | None:
        given = {key.removeprefix(f"in.{name}."): value for key, value in self.tensors.items()}
        if "latent" not in given:
            return None
        keyframes = given.get("keyframes_mask")
        return TokenStream(
            tokens_BTC=given["latent"],
            timesteps=DistinctTimesteps.from_tokens(given["timesteps"].squeeze(-1)),
            sigma_B=given["sigma"],
            positions_BAT2=given["positions"],
            text_BSD=given["context"],
            text_mask_BS=given.get("context_mask"),
            attention_mask_BTT=given.get("attention_mask"),
            keyframes_mask_BT=None if keyframes is None else keyframes.squeeze(-1),
        )

    def _ltx_video_stream(self) -> TokenStream:
        start_BAT = self["in.positions"]
        # Where tokens end is not recorded: 32 pixels further; 8 frames later, but the first latent is a single frame.
        extent_BAT = torch.full_like(start_BAT, 32.0)
        extent_BAT[:, 0] = torch.where(start_BAT[:, 0] == 0, 0.04, 0.32)
        return TokenStream(
            tokens_BTC=self["in.latent"],
            timesteps=DistinctTimesteps.from_tokens(self["in.timesteps"]),
            sigma_B=self["in.timesteps"].amax(dim=1),
            positions_BAT2=torch.stack((start_BAT, start_BAT + extent_BAT), dim=-1),
            text_BSD=self["in.context"],
            text_mask_BS=self["in.context_mask"],
        )


@pytest.fixture(scope="session")
def load(fixtures: GoldenFolders) -> Callable[[str], AudioVideoDenoiser]:
    """The float32 denoiser of a golden folder, loaded once."""

    @cache
    def load(folder: str) -> AudioVideoDenoiser:
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        return load_denoiser(checkpoint, reference_ops(), "cpu", torch.float32)

    return load


@pytest.fixture(scope="session")
def load_altered(fixtures: GoldenFolders) -> Callable[..., AudioVideoDenoiser]:
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
def golden(golden: Callable[[str], GoldenCase]) -> Callable[[str], DenoiserCase]:
    """Reads the case of a name such as dit_ltx2_0/case_t2v."""
    return lambda name: DenoiserCase(**vars(golden(name)))


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.inference_mode():
        yield


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
