"""When a job would end if its clips were rendered on given layouts: the clips laid out in time on the fleet's GPUs.

Pure arithmetic on estimates. A group stays within a node; another layout in its place costs the load of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import Offer


@dataclass(frozen=True)
class Busy:
    """A clip in flight, and how long it has to go."""

    layout: ParallelLayout
    left_s: float

    @property
    def gpu_seconds_left(self) -> float:
        return self.left_s * self.layout.num_gpus


@dataclass(frozen=True)
class Fleet:
    """The GPUs that a job may use, in nodes of `gpus_per_node`; none while that is not known.

    `held` counts the job's groups by layout, at work or not. `load_s` is what a new one takes until its first clip.
    """

    num_gpus: int
    gpus_per_node: int
    load_s: float = 0.0
    held: Mapping[ParallelLayout, int] = field(default_factory=dict)


@dataclass
class _Place:
    """GPUs of one node that are free together at `free_s`; with `layout` they are a group of it."""

    free_s: float
    width: int
    layout: ParallelLayout | None = None


def end_s(way: Sequence[Offer], busy: Sequence[Busy], fleet: Fleet) -> float:
    """Seconds until the last clip has ended, with each clip in turn where it ends first."""
    nodes = _nodes(busy, fleet)
    for offer in way:
        _lay(offer, nodes, fleet.load_s)
    return max((place.free_s for node in nodes for place in node), default=0.0)


def _nodes(busy: Sequence[Busy], fleet: Fleet) -> list[list[_Place]]:
    """The fleet as it is: groups at work, idle ones, GPUs that nobody holds. Which node a group is on is not known; the
    widest are put first, as they would be."""
    full, rest = divmod(fleet.num_gpus, max(1, fleet.gpus_per_node))
    free = [fleet.gpus_per_node] * full + ([rest] if rest else [])
    nodes: list[list[_Place]] = [[] for _ in free]
    places = [_Place(each.left_s, each.layout.num_gpus, each.layout) for each in busy]
    for layout, num_held in fleet.held.items():
        num_idle = num_held - sum(each.layout == layout for each in busy)
        places += [_Place(0.0, layout.num_gpus, layout) for _ in range(num_idle)]
    for place in sorted(places, key=lambda place: -place.width):
        index = next((i for i, num_free in enumerate(free) if num_free >= place.width), None)
        if index is not None:
            free[index] -= place.width
            nodes[index].append(place)
    for node, num_free in zip(nodes, free, strict=True):
        node += [_Place(0.0, 1) for _ in range(num_free)]
    return nodes


def _lay(offer: Offer, nodes: list[list[_Place]], load_s: float) -> None:
    """Put a clip into a group of its layout, or into GPUs that become one, wherever it ends first."""
    standing = min(
        (place for node in nodes for place in node if place.layout == offer.layout),
        key=lambda place: place.free_s,
        default=None,
    )
    width, best = offer.layout.num_gpus, None
    for node in nodes:
        ready_s, taken = _taken(node, width)
        if taken and (best is None or ready_s + load_s < best[0]):
            best = (ready_s + load_s, node, taken)
    if standing is not None and (best is None or standing.free_s <= best[0]):
        standing.free_s += offer.estimate.clip_s
    elif best is not None:
        start_s, node, taken = best
        rest = sum(place.width for place in taken) - width
        node[:] = [place for place in node if not any(place is each for each in taken)]
        node += [_Place(taken[-1].free_s, 1) for _ in range(rest)]
        node.append(_Place(start_s + offer.estimate.clip_s, width, offer.layout))
    else:
        # No node is wide enough: such a way of sharing never ends.
        nodes.append([_Place(float("inf"), width)])


def _taken(node: Sequence[_Place], width: int) -> tuple[float, list[_Place]]:
    """The places of a node that are the first to be free for `width` GPUs, and when; none if it has fewer."""
    taken: list[_Place] = []
    num_taken = 0
    for place in sorted(node, key=lambda place: (place.free_s, place.layout is not None)):
        taken.append(place)
        num_taken += place.width
        if num_taken >= width:
            return place.free_s, taken
    return 0.0, []
