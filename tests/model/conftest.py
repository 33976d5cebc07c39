"""Golden cases of the denoiser as values: tiny models in the published format, recorded inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.ops import reference_ops
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.streams import DistinctTimesteps, Perturbation, TokenStream
from tests.golden import GoldenFolders
from tests.golden_case import GoldenCase


class DenoiserCase(GoldenCase):
    """One recorded call of a denoiser: `video`, `audio` and `perturbations` go in."""

    @property
    def video(self) -> TokenStream | None:
        return self._stream("video")

    @property
    def audio(self) -> TokenStream | None:
        return self._stream("audio")

    @property
    def perturbations(self) -> tuple[Perturbation, ...] | None:
        recorded = self.params.get("perturbations")
        return None if recorded is None else tuple(_perturbation(sample) for sample in recorded)

    def _stream(self, name: str) -> TokenStream | None:
        given = {key.removeprefix(f"in.{name}."): value for key, value in self.tensors.items()}
        if "latent" not in given:
            return None
        return TokenStream(
            tokens_BTC=given["latent"],
            timesteps=DistinctTimesteps.from_tokens(given["timesteps"].squeeze(-1)),
            sigma_B=given["sigma"],
            positions_BAT2=given["positions"],
            text_BSD=given["context"],
            text_mask_BS=given.get("context_mask"),
            attention_mask_BTT=given.get("attention_mask"),
        )


@pytest.fixture(scope="session")
def av_denoiser(fixtures: GoldenFolders) -> AudioVideoDenoiser:
    return load_denoiser(CheckpointFile(fixtures / "dit_ltx2_0" / "model.safetensors"), reference_ops(), "cpu")


@pytest.fixture(scope="session")
def video_only_denoiser(fixtures: GoldenFolders) -> AudioVideoDenoiser:
    path = fixtures / "dit_ltx2_0_video_model" / "model.safetensors"
    return load_denoiser(CheckpointFile(path), reference_ops(), "cpu")


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
