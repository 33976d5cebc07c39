"""Several ranks decode a picture by rows, over gloo or NCCL: no seams, in any number of parts, even or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.engine.components.streamed_decoder import Manner
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder, load_video_decoder
from pipeline.model.checkpoint import CheckpointFile
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.rows import share_rows
from tests.distributed.ranks import Raised, Ranks, require_gpus

LATENT_CHANNELS = 16
BOUND = 1e-12
# Reflected at the picture's edges; reflected, other blocks; zeros there, and told a timestep; the toy-width model.
MODELS = ["vae_ltx2_0", "vae_ltx2_3", "vae_ltxv_0_9_8", "nano"]


def pixels(
    groups: RankGroups | None, path: Path, latent_BCFHW: Tensor, frames: int, device: str = "cpu", fuses: bool = False
) -> Tensor:
    decoder = load_video_decoder(CheckpointFile(path), device=device, dtype=None)
    # A norm over channels that are nearly all 0 makes much of a rounding in float32 (8e-5 of scale was seen).
    decoder.module.double()
    # The plain operations, which know float64: Triton's do not.
    decoder.manner = Manner(frames, reference_ops() if fuses else None)
    if groups is not None:
        decoder.share_rows = partial(share_rows, axis=groups.world)
    return torch.cat(list(decoder.stream(latent_BCFHW.to(device), noise=_noise_for(decoder))), dim=2).cpu()


def _noise_for(decoder: VideoDecoder) -> DecodeNoise | None:
    return DecodeNoise(0.05) if decoder.takes_noise else None


def latent_of(num_rows: int) -> Tensor:
    return torch.randn(1, LATENT_CHANNELS, 3, num_rows, 3, generator=torch.Generator().manual_seed(1))


def assert_pixels_of_one(answers: list[Tensor], wanted: Tensor) -> None:
    for answer in answers:
        assert not isinstance(answer, Raised), answer
        assert float((answer - wanted).abs().max() / wanted.abs().max()) < BOUND


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("layout", "num_rows", "frames"), [("ulysses2", 4, 1), ("tensor2", 5, 2), ("ring3", 7, 1), ("guidance4", 11, 8)]
)
def test_every_rank_has_the_pixels_of_one(
    ranks: Ranks, model: Callable[[str], Path], name: str, layout: str, num_rows: int, frames: int
) -> None:
    latent_BCFHW = latent_of(num_rows)
    answers = ranks.run(layout, pixels, model(name), latent_BCFHW, frames)
    assert_pixels_of_one(answers, pixels(None, model(name), latent_BCFHW, frames))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("layout", "num_rows", "frames"), [("tensor2", 5, 2), ("ring3", 7, 8)])
def test_every_rank_with_fused_operations_has_the_pixels_of_one_without(
    ranks: Ranks, model: Callable[[str], Path], name: str, layout: str, num_rows: int, frames: int
) -> None:
    latent_BCFHW = latent_of(num_rows)
    answers = ranks.run(layout, pixels, model(name), latent_BCFHW, frames, "cpu", True)
    assert_pixels_of_one(answers, pixels(None, model(name), latent_BCFHW, frames))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("layout", "num_rows", "frames"), [("ulysses2", 5, 1), ("ring2_ulysses2", 11, 8)])
def test_every_rank_on_a_gpu_has_the_pixels_of_one(
    gpu_ranks: Ranks, model: Callable[[str], Path], name: str, layout: str, num_rows: int, frames: int
) -> None:
    require_gpus(layout)
    latent_BCFHW = latent_of(num_rows)
    answers = gpu_ranks.run(layout, pixels, model(name), latent_BCFHW, frames, "cuda", timeout_s=60.0)
    # In float64 there too, where no GPU has a shorter way to round.
    assert_pixels_of_one(answers, pixels(None, model(name), latent_BCFHW, frames))


def share_of(groups: RankGroups, num_rows: int) -> tuple[int, ...] | None:
    shared = share_rows(num_rows, groups.world)
    return None if shared is None else shared.counts


def test_rows_are_shared_as_evenly_as_they_go_and_too_few_not_at_all(ranks: Ranks) -> None:
    assert ranks.run("ulysses4", share_of, 34) == [(9, 9, 8, 8)] * 4
    assert ranks.run("ulysses4", share_of, 7) == [None] * 4
