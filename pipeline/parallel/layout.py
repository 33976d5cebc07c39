"""From a layout and a rank to the groups of processes that this rank works with.

Ranks are numbered along `AXES`, the last of them fastest: tensor innermost, then ulysses, ring, and guidance outermost.
Rank 0 leads. What a layout is, and which there can be, is in `pipeline/records/parallel.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.distributed as dist

from pipeline.errors import UsageError
from pipeline.records.parallel import AXES, ParallelLayout


@dataclass(frozen=True, eq=False)
class Axis:
    """The ranks that differ from this one along one axis, or several, and in nothing else, itself among them.

    `ranks` are those of the world, in order; this one is `ranks[index]`. There is no group of a rank alone.
    """

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, eq=False)
class SequenceAxes:
    """Those that split the video's tokens: the part of rank (ring r, ulysses u) is number r * ulysses.size + u."""

    ring: Axis
    ulysses: Axis


@dataclass(frozen=True, eq=False)
class RankGroups:
    """What one rank knows of the others.

    `tokens` are all ranks with a part of the tokens, `sequence` the same by axis. `audio` and `audio_tensor` are the
    same ranks again, in groups of their own: on CUDA the audio stream's work is queued beside the video's, and of one
    communicator all collectives come one after the other, in the order in which they were queued. Those of the video
    would wait for audio that is not computed yet.
    """

    layout: ParallelLayout
    world: Axis
    tokens: Axis
    sequence: SequenceAxes
    audio: SequenceAxes
    tensor: Axis
    audio_tensor: Axis
    guidance: Axis

    @property
    def is_leader(self) -> bool:
        return self.world.index == 0


def ranks_along(layout: ParallelLayout, *axes: str) -> list[tuple[int, ...]]:
    """Every group of ranks that differ along these axes only; each rank is in one of them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(itertools.product(*(range(degree) for degree in layout.degrees))):
        rest = tuple(at for axis, at in zip(AXES, place, strict=True) if axis not in axes)
        groups.setdefault(rest, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def form_groups(layout: ParallelLayout) -> RankGroups:
    """The groups of this process, whose default process group is there. Every rank of the world must call it alike.

    UsageError if there are not as many ranks as the layout wants.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_ranks != layout.num_gpus:
        raise UsageError(
            f"layout {layout.name} needs {layout.num_gpus} ranks, got {num_ranks}; start as many, or use another layout"
        )
    return RankGroups(
        layout=layout,
        world=_axis(layout, rank, *AXES),
        tokens=_axis(layout, rank, "ring", "ulysses"),
        sequence=SequenceAxes(_axis(layout, rank, "ring"), _axis(layout, rank, "ulysses")),
        audio=SequenceAxes(_axis(layout, rank, "ring"), _axis(layout, rank, "ulysses")),
        tensor=_axis(layout, rank, "tensor"),
        audio_tensor=_axis(layout, rank, "tensor"),
        guidance=_axis(layout, rank, "guidance"),
    )


def _axis(layout: ParallelLayout, rank: int, *axes: str) -> Axis:
    mine: Axis | None = None
    for ranks in ranks_along(layout, *axes):
        # A group is made by all ranks of the world together, also by those that are not in it.
        group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Axis(ranks, ranks.index(rank), group)
    assert mine is not None, "every rank has a place along every axis"
    return mine
