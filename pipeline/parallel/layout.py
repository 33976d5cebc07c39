"""From a layout and a rank to the groups of processes that this rank works with.

Ranks are numbered along `AXES`, the last of them fastest: tensor innermost, then ulysses, ring, and guidance outermost.
Rank 0 leads. What a layout is, and which there can be, is in `pipeline/records/parallel.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import UsageError
from pipeline.records.parallel import AXES, ParallelLayout


@dataclass(eq=False)
class Axis:
    """The ranks that differ from this one along one axis, or several, and in nothing else, itself among them.

    `ranks` are those of the world, in order; this one is `ranks[index]`. There is no group of a rank alone, nor of one
    that left: what holds an axis (slots of a denoiser, say) must not keep connections open that others wait at. Axes
    of the same ranks may have the same group.
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
    would wait for audio that is not computed yet. All other axes come one after the other anyway: those of the same
    ranks share a group, because every communicator takes memory of the device.
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

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis, those of both streams apart."""
        split = (self.sequence.ring, self.sequence.ulysses, self.audio.ring, self.audio.ulysses)
        return self.world, self.tokens, *split, self.tensor, self.audio_tensor, self.guidance

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every group of this rank once, in the same order on all ranks."""
        return list(dict.fromkeys(axis.group for axis in self.axes if axis.group is not None))


def ranks_along(layout: ParallelLayout, *axes: str) -> list[tuple[int, ...]]:
    """Every group of ranks that differ along these axes only; each rank is in one of them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(itertools.product(*(range(degree) for degree in layout.degrees))):
        rest = tuple(at for axis, at in zip(AXES, place, strict=True) if axis not in axes)
        groups.setdefault(rest, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def form_groups(layout: ParallelLayout, timeout: timedelta) -> RankGroups:
    """The groups of this process, whose default process group is there. Every rank of the world must call it alike.

    `timeout` is that of their collectives. UsageError if there are not as many ranks as the layout wants.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_ranks != layout.num_gpus:
        raise UsageError(
            f"layout {layout.name} needs {layout.num_gpus} ranks, got {num_ranks}; start as many, or use another layout"
        )

    every = tuple(range(num_ranks))
    main, audio = _Lane(timeout, {every: dist.group.WORLD}), _Lane(timeout, {})

    def along(*axes: str, lane: _Lane = main) -> Axis:
        mine: Axis | None = None
        for ranks in ranks_along(layout, *axes):
            # All ranks of the world make a group together, also those that are not in it.
            group = lane.group_of(ranks)
            if rank in ranks:
                mine = Axis(ranks, ranks.index(rank), group)
        assert mine is not None, "every rank has a place along every axis"
        return mine

    return RankGroups(
        layout=layout,
        world=along(*AXES),
        tokens=along("ring", "ulysses"),
        sequence=SequenceAxes(along("ring"), along("ulysses")),
        audio=SequenceAxes(along("ring", lane=audio), along("ulysses", lane=audio)),
        tensor=along("tensor"),
        audio_tensor=along("tensor", lane=audio),
        guidance=along("guidance"),
    )


@dataclass(frozen=True, eq=False)
class _Lane:
    """Work that is queued in one order, and the groups that it goes through, by their ranks."""

    timeout: timedelta
    made: dict[tuple[int, ...], dist.ProcessGroup | None]

    def group_of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The lane's group of these ranks, made if there is none yet; None for a rank alone."""
        if len(ranks) > 1 and ranks not in self.made:
            # Left to itself, a group takes the library's timeout of half an hour, and not that of the world.
            self.made[ranks] = dist.new_group(list(ranks), timeout=self.timeout)
        return self.made[ranks] if len(ranks) > 1 else None
