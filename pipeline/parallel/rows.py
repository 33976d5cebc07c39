"""Decoding a picture on several ranks: each has some rows of it, and asks its neighbours for those at the seams.

A convolution that is given its neighbours' rows computes what it would on the whole picture, so there are no seams, and
nothing is computed twice. Every rank goes through the same layers with the same frames, in the same order.

Shapes: B batch, C channels, F frames, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.parallel.collectives import gathered, swapped_with_neighbours
from pipeline.parallel.layout import Axis
from pipeline.parallel.shards import padded
from pipeline.records.parallel import MIN_DECODE_ROWS


@dataclass(frozen=True, eq=False)
class RankRows:
    """The rows of one rank: `counts[i]` of the latent's are those of rank i of the axis, in order."""

    axis: Axis
    counts: tuple[int, ...]

    def part(self, latent_BCFHW: Tensor) -> Tensor:
        """The rows that are decoded here."""
        start = sum(self.counts[: self.axis.index])
        return latent_BCFHW[..., start : start + self.counts[self.axis.index], :]

    def neighbours(self, rows_BCFHW: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
        """The `count` rows above this rank's and below them; None at the picture's edge."""
        return swapped_with_neighbours(rows_BCFHW[..., :count, :], rows_BCFHW[..., -count:, :], self.axis)

    def whole(self, frame_B3FHW: Tensor) -> Tensor:
        """The frame, on every rank."""
        each = frame_B3FHW.shape[3] // self.counts[self.axis.index]
        most = max(self.counts) * each
        parts = gathered(padded(frame_B3FHW, 3, most)[None], self.axis, dim=0)
        return torch.cat([parts[i, ..., : n * each, :] for i, n in enumerate(self.counts)], dim=3)


def share_rows(num_rows: int, axis: Axis) -> RankRows | None:
    """A latent's rows over the ranks of the axis, as evenly as they go; None if they are too few for all."""
    least, more = divmod(num_rows, axis.size)
    if axis.size == 1 or least < MIN_DECODE_ROWS:
        return None
    return RankRows(axis, tuple(least + (index < more) for index in range(axis.size)))
