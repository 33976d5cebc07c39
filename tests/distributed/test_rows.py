"""Several ranks decode a picture by rows, over gloo: no seams, in any number of parts, even or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.engine.components.streamed_decoder import Manner
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder, load_video_decoder
from pipeline.model.checkpoint import CheckpointFile
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.rows import share_rows
from tests.distributed.ranks import Raised, Ranks

LATENT_CHANNELS = 16
BOUND = 1e-12
# Reflected at the picture's edges; reflected, other blocks; zeros there, and told a timestep; the toy-width model.
MODELS = ["vae_ltx2_0", "vae_ltx2_3", "vae_ltxv_0_9_8", "nano"]


def pixels(groups: RankGroups | None, path: Path, latent_BCFHW: Tensor, frames: int) -> Tensor:
    decoder = load_video_decoder(CheckpointFile(path), device="cpu", dtype=None)
    # A norm over channels that are nearly all 0 makes much of a rounding in float32 (8e-5 of scale was seen).
    decoder.module.double()
    decoder.manner = Manner(frames)
    if groups is not None:
        decoder.share_rows = partial(share_rows, axis=groups.world)
    return torch.cat(list(decoder.stream(latent_BCFHW, noise=_noise_for(decoder))), dim=2)


def _noise_for(decoder: VideoDecoder) -> DecodeNoise | None:
    return DecodeNoise(0.05) if decoder.takes_noise else None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("layout", "num_rows", "frames"), [("ulysses2", 4, 1), ("tensor2", 5, 2), ("ring3", 7, 1), ("guidance4", 11, 8)]
)
def test_every_rank_has_the_pixels_of_one(
    ranks: Ranks, model: Callable[[str], Path], name: str, layout: str, num_rows: int, frames: int
) -> None:
    latent_BCFHW = torch.randn(1, LATENT_CHANNELS, 3, num_rows, 3, generator=torch.Generator().manual_seed(1))
    wanted = pixels(None, model(name), latent_BCFHW, frames)
    for answer in ranks.run(layout, pixels, model(name), latent_BCFHW, frames):
        assert not isinstance(answer, Raised), answer
        assert float((answer - wanted).abs().max() / wanted.abs().max()) < BOUND


def share_of(groups: RankGroups, num_rows: int) -> tuple[int, ...] | None:
    shared = share_rows(num_rows, groups.world)
    return None if shared is None else shared.counts


def test_rows_are_shared_as_evenly_as_they_go_and_too_few_not_at_all(ranks: Ranks) -> None:
    assert ranks.run("ulysses4", share_of, 34) == [(9, 9, 8, 8)] * 4
    assert ranks.run("ulysses4", share_of, 7) == [None] * 4
