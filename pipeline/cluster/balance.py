"""Which workers to start and which to give back, so that a cluster holds those that a queue can use.

Pure: what is there comes in as values, what to do goes out. Workers are ranks of one node each, so room is counted by
node; where a wide worker lacks GPUs, narrower ones on the node where most of them are idle make room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.records.parallel import ParallelLayout


@dataclass(frozen=True)
class Standing:
    """A worker that is asked for or placed. `node` is None until it is placed.

    It `is_idle` if it holds nothing, and `is_spare` once it has been idle for so long that keeping it does not pay.
    """

    name: str
    layout: ParallelLayout
    node: str | None
    is_idle: bool
    is_spare: bool

    @property
    def num_gpus(self) -> int:
        return self.layout.num_gpus


@dataclass(frozen=True)
class Moves:
    """Layouts of workers to start, the widest first, and names of those to give back."""

    start: tuple[ParallelLayout, ...] = ()
    give_back: tuple[str, ...] = ()


@dataclass
class _Room:
    """GPUs of a node."""

    size: int
    free: int = 0
    # Of workers that are ending: free soon.
    ending: int = 0


@dataclass
class Balance:
    """`workers` are those that stay, the newest last; `ending` counts GPUs of each node that are on their way back;
    `nodes` are the GPUs of each, `max_gpus` the most that may be held of all."""

    workers: Sequence[Standing]
    ending: Mapping[str | None, int]
    nodes: Mapping[str, int]
    wanted: Mapping[ParallelLayout, int]
    max_gpus: int | None = None
    num_spare: int = 0
    _rooms: dict[str, _Room] = field(default_factory=dict, init=False)
    _left: float = field(default=0.0, init=False)
    # Asked for, but for now no node has room for them.
    _stuck: list[ParallelLayout] = field(default_factory=list, init=False)

    def moves(self) -> Moves:
        self._count_rooms()
        missing = Counter({layout: num for layout, num in self.wanted.items() if num > 0})
        missing.subtract(worker.layout for worker in self.workers)
        start, lacking = self._to_start(missing)
        give_back = self._surplus(missing)
        for layout in [*self._stuck[:1], *lacking]:
            give_back |= self._make_room(layout, missing, give_back)
        return Moves(tuple(start), tuple(give_back))

    def _count_rooms(self) -> None:
        self._rooms = {node: _Room(size, size) for node, size in self.nodes.items()}
        held = 0
        for worker in self.workers:
            held += worker.num_gpus
            if worker.node in self._rooms:
                self._rooms[worker.node].free -= worker.num_gpus
        for node, num_gpus in self.ending.items():
            held += num_gpus
            if node in self._rooms:
                self._rooms[node].free -= num_gpus
                self._rooms[node].ending += num_gpus
        self._left = float("inf") if self.max_gpus is None else self.max_gpus - held
        # What was asked for takes its place first.
        self._stuck = [w.layout for w in self._by_width() if w.node is None and not self._take(w.num_gpus)]

    def _by_width(self) -> list[Standing]:
        return sorted(self.workers, key=lambda worker: -worker.num_gpus)

    def _take(self, num_gpus: int) -> bool:
        """Put a worker where it leaves least room; False if it fits no node now."""
        fitting = [room for room in self._rooms.values() if room.free >= num_gpus]
        if not fitting:
            return False
        min(fitting, key=lambda room: room.free).free -= num_gpus
        return True

    def _to_start(self, missing: Mapping[ParallelLayout, int]) -> tuple[list[ParallelLayout], list[ParallelLayout]]:
        """What of the missing there is room for, and what not: of each layout one is named."""
        start: list[ParallelLayout] = []
        lacking: list[ParallelLayout] = []
        for layout in sorted(missing, key=lambda layout: (-layout.num_gpus, layout.name)):
            for _ in range(missing[layout]):
                if self._left < layout.num_gpus or not self._take(layout.num_gpus):
                    lacking.append(layout)
                    break
                self._left -= layout.num_gpus
                start.append(layout)
        if not (start or self.workers or any(self.ending.values())) and lacking:
            # A cluster may grow, and one that cannot hold it must be said to: somebody has to ask.
            start.append(lacking.pop(0))
        return start, lacking

    def _surplus(self, missing: Mapping[ParallelLayout, int]) -> dict[str, None]:
        """Spare workers beyond the wish; those that still wait for a place first, then the newest."""
        given: dict[str, None] = {}
        for layout in {worker.layout for worker in self.workers}:
            num_kept = self.num_spare if self.wanted.get(layout) else 0
            num_surplus = max(0, -missing.get(layout, 0) - num_kept)
            spare = [w for w in reversed(self.workers) if w.layout == layout and w.is_spare]
            spare.sort(key=lambda worker: worker.node is not None)
            given |= dict.fromkeys(worker.name for worker in spare[:num_surplus])
        return given

    def _make_room(
        self, layout: ParallelLayout, missing: Mapping[ParallelLayout, int], given: Mapping[str, None]
    ) -> dict[str, None]:
        """Idle workers to give back on one node, so that a worker of `layout` finds room there.

        Those beyond the wish, and narrower ones: they find room elsewhere, where it would not.
        """
        surplus = Counter({each: -num for each, num in missing.items() if num < 0})
        yielding = [w for w in self.workers if w.layout != layout and self._yields(w, layout, surplus)]
        if self._left < layout.num_gpus:
            unplaced = [w for w in yielding if w.node is None and w.is_idle]
            if unplaced:
                return {unplaced[-1].name: None}

        def of(node: str, *, idle_only: bool) -> list[Standing]:
            return [w for w in yielding if w.node == node and (w.is_idle or not idle_only)]

        def gpus(workers: Sequence[Standing]) -> int:
            return sum(worker.num_gpus for worker in workers)

        best, best_gpus = None, -1
        for node, room in self._rooms.items():
            soon = room.free + room.ending
            if soon + gpus(of(node, idle_only=False)) >= layout.num_gpus:
                now = soon + gpus(of(node, idle_only=True))
                if now > best_gpus:
                    best, best_gpus = node, now
        if best is None:
            return {}
        room, chosen = self._rooms[best], {}
        lacks = layout.num_gpus - room.free - room.ending
        lacks -= gpus([w for w in of(best, idle_only=True) if w.name in given])
        for worker in of(best, idle_only=True):
            if lacks <= 0:
                break
            if worker.name not in given:
                chosen[worker.name] = None
                lacks -= worker.num_gpus
        return chosen

    def _yields(self, worker: Standing, to: ParallelLayout, surplus: Mapping[ParallelLayout, int]) -> bool:
        return surplus.get(worker.layout, 0) > 0 or worker.num_gpus < to.num_gpus
