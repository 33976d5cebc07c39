"""The predictions of a guided step over several ranks: each computes its share, all get all of them.

Which predictions there are and how they are combined is the engine's. It combines them on every rank alike, so that
every rank goes on from the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.parallel.collectives import gathered
from pipeline.parallel.layout import Axis

# Of video and audio, (1,T,C) of one dtype.
Velocities = tuple[Tensor, Tensor | None]


class SpreadPasses:
    """What `pipeline.engine.denoise.PassSpread` describes, over the ranks of `axis`."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __call__(self, names: Sequence[str], compute: Callable[[Sequence[str]], list[Velocities]]) -> list[Velocities]:
        """The first ranks take one more if the names do not come out even; one name alone is computed by all."""
        if self._axis.size == 1 or len(names) == 1:
            return compute(names)
        share = -(-len(names) // self._axis.size)
        start = self._axis.index * share
        # A rank that is left without computes what another does, because it needs the shape of what it receives.
        computed = compute(names[start : start + share] or names[-1:])
        rows = [_flat(velocities) for velocities in computed]
        rows += rows[-1:] * (share - len(rows))
        all_rows = gathered(torch.stack(rows), self._axis, dim=0)[: len(names)]
        return [_restored(row, like=computed[0]) for row in all_rows]


def _flat(velocities: Velocities) -> Tensor:
    return torch.cat([x_BTC.flatten() for x_BTC in velocities if x_BTC is not None])


def _restored(row: Tensor, like: Velocities) -> Velocities:
    video_BTC, audio_BTC = like
    split = video_BTC.numel()
    return row[:split].view_as(video_BTC), None if audio_BTC is None else row[split:].view_as(audio_BTC)
