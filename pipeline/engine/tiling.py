"""Decoding and encoding in tiles that overlap: what does not fit the device at once, at the price of faint seams.

Pure tensor functions around a network given as a function. The cutting and blending are the published ones, so that
tiled results equal the reference's; the networks are in `components/video_vae.py`.

Shapes: B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.geometry import SPATIAL_CELL_PX, TEMPORAL_CELL_FRAMES


@dataclass(frozen=True)
class Span:
    """Tiles along one axis, in latent cells: each `size` long, neighbours share `overlap`. Size 0: one tile."""

    size: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.size and not 0 <= self.overlap < self.size:
            raise UsageError(
                f"the overlap of tiles must be from 0 to less than their size {self.size}, got {self.overlap}"
            )


@dataclass(frozen=True)
class Tiles:
    """How a clip is cut along time, height and width."""

    frames: Span = Span()
    height: Span = Span()
    width: Span = Span()


def tiles_of_size(
    *, frames: tuple[int, int] = (0, 0), height_px: tuple[int, int] = (0, 0), width_px: tuple[int, int] = (0, 0)
) -> Tiles:
    """Tiles given in frames and pixels as (size, overlap), rounded down to latent cells; (0, 0) leaves it whole."""
    cells = (TEMPORAL_CELL_FRAMES, SPATIAL_CELL_PX, SPATIAL_CELL_PX)
    spans = [
        Span(size // cell, overlap // cell)
        for (size, overlap), cell in zip((frames, height_px, width_px), cells, strict=True)
    ]
    return Tiles(*spans)


def tiles_of_count(
    size: tuple[int, int, int],
    *,
    frames: tuple[int, int] = (1, 0),
    height: tuple[int, int] = (1, 0),
    width: tuple[int, int] = (1, 0),
) -> Tiles:
    """Tiles given as (how many, overlap in latent cells) for latents of `size` (frames, height, width)."""
    spans = [
        Span(math.ceil((length + (count - 1) * overlap) / count), overlap) if count > 1 else Span()
        for length, (count, overlap) in zip(size, (frames, height, width), strict=True)
    ]
    return Tiles(*spans)


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latent_BCFHW: Tensor, tiles: Tiles) -> Tensor:
    """What `decode` gives of each tile, blended: latents (B,C,F,H,W) to pixels (B,3,8F-7,32H,32W)."""
    num_frames, height, width = latent_BCFHW.shape[2:]
    size = ((num_frames - 1) * TEMPORAL_CELL_FRAMES + 1, height * SPATIAL_CELL_PX, width * SPATIAL_CELL_PX)
    axes = (
        [_frames_of(tile) for tile in _cut(num_frames, tiles.frames, is_causal=True)],
        [_pixels_of(tile) for tile in _cut(height, tiles.height)],
        [_pixels_of(tile) for tile in _cut(width, tiles.width)],
    )
    return _blend(decode, latent_BCFHW, axes, size)


def encode_in_tiles(encode: Callable[[Tensor], Tensor], video_BCFHW: Tensor, tiles: Tiles) -> Tensor:
    """What `encode` gives of each tile, blended: pixels (B,3,F,H,W) to latents (B,C,(F+7)/8,H/32,W/32)."""
    num_frames, height, width = video_BCFHW.shape[2:]
    size = ((num_frames - 1) // TEMPORAL_CELL_FRAMES + 1, height // SPATIAL_CELL_PX, width // SPATIAL_CELL_PX)
    axes = (
        [_reversed(_frames_of(tile), tile, from_zero=True) for tile in _cut(size[0], tiles.frames, is_causal=True)],
        [_reversed(_pixels_of(tile), tile) for tile in _cut(size[1], tiles.height)],
        [_reversed(_pixels_of(tile), tile) for tile in _cut(size[2], tiles.width)],
    )
    return _blend(encode, video_BCFHW, axes, size)


@dataclass(frozen=True)
class _Tile:
    """Latent cells [start,end) of one tile along one axis, and how many of them it shares with each neighbour."""

    start: int
    end: int
    shared_before: int
    shared_after: int


@dataclass(frozen=True)
class _Cut:
    """One tile along one axis: where it is taken from, where its result goes, and with which weights."""

    source: slice
    target: slice
    weights: Tensor


def _cut(length: int, span: Span, *, is_causal: bool = False) -> list[_Tile]:
    if not span.size or length <= span.size:
        return [_Tile(0, length, 0, 0)]
    step = span.size - span.overlap
    count = math.ceil((length - span.overlap) / step)
    # The first cell of any tile stands for a single frame: later tiles begin a cell earlier, which then weighs nothing.
    earlier = 1 if is_causal else 0
    return [
        _Tile(
            start=max(0, index * step - earlier),
            end=min(index * step + span.size, length),
            shared_before=span.overlap + earlier if index else 0,
            shared_after=span.overlap if index < count - 1 else 0,
        )
        for index in range(count)
    ]


def _frames_of(tile: _Tile) -> _Cut:
    start, end = tile.start * TEMPORAL_CELL_FRAMES, (tile.end - 1) * TEMPORAL_CELL_FRAMES + 1
    rising = (tile.shared_before - 1) * TEMPORAL_CELL_FRAMES + 1 if tile.shared_before else 0
    weights = _trapezoid(end - start, rising, tile.shared_after * TEMPORAL_CELL_FRAMES, from_zero=True)
    return _Cut(slice(tile.start, tile.end), slice(start, end), weights)


def _pixels_of(tile: _Tile) -> _Cut:
    start, end = tile.start * SPATIAL_CELL_PX, tile.end * SPATIAL_CELL_PX
    weights = _trapezoid(end - start, tile.shared_before * SPATIAL_CELL_PX, tile.shared_after * SPATIAL_CELL_PX)
    return _Cut(slice(tile.start, tile.end), slice(start, end), weights)


def _reversed(cut: _Cut, tile: _Tile, *, from_zero: bool = False) -> _Cut:
    """The same tile for an encoder: pixels in, cells out."""
    weights = _trapezoid(tile.end - tile.start, tile.shared_before, tile.shared_after, from_zero=from_zero)
    return _Cut(cut.target, cut.source, weights)


def _trapezoid(length: int, rising: int, falling: int, *, from_zero: bool = False) -> Tensor:
    """Weights that rise over the first values, stay 1, and fall over the last."""
    weights = torch.ones(length)
    if rising:
        weights[:rising] = (
            torch.linspace(0, 1, rising + 1)[:-1] if from_zero else torch.linspace(0, 1, rising + 2)[1:-1]
        )
    if falling:
        weights[length - falling :] *= torch.linspace(1, 0, falling + 2)[1:-1]
    return weights


def _blend(
    network: Callable[[Tensor], Tensor],
    given: Tensor,
    axes: tuple[list[_Cut], ...],
    size: tuple[int, ...],
) -> Tensor:
    """The network's results of all tiles, each weighted along three axes, over the sum of the weights."""
    total: Tensor | None = None
    weight_FHW = torch.zeros(size, device=given.device)
    for cuts in product(*axes):
        result = network(given[:, :, *(cut.source for cut in cuts)])
        where = tuple(cut.target for cut in cuts)
        along_F, along_H, along_W = (cut.weights.to(result.device) for cut in cuts)
        mask_FHW = along_F[:, None, None] * along_H[:, None] * along_W
        if total is None:
            total = torch.zeros(*result.shape[:2], *size, device=result.device)
        total[:, :, *where] += result.float() * mask_FHW
        weight_FHW[where] += mask_FHW
    assert total is not None, "every axis has a tile"
    return (total / weight_FHW).to(result.dtype)
