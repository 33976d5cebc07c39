"""A simulated fleet: a Pool whose groups load, render, straggle, fail, hang and are preempted on a clock of their own.

Driver, queue and policy run on it unchanged. Every random choice comes from one seed. Seconds are simulated ones.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial

from pipeline.cluster.balance import Balance, Standing
from pipeline.cluster.pool import Finished, Freed, Held, PoolEvent, WorkerGone
from pipeline.planning.policy import silence_limit_s
from pipeline.planning.timetable import Fleet
from pipeline.records.outcome import Failed, LedgerEntry, Rendered, Timings, WorkerSeat, ledger_entry
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem
from tests.unit.makers import S, asset

USD_PER_GPU_S = Decimal("0.001")
# What a clip's time is spent on, in order, as shares.
STATES = (("text_encode", 0.02), ("denoise", 0.88), ("decode", 0.10))


@dataclass(frozen=True)
class Weather:
    """What goes wrong, and how often."""

    load_s: float = 90.0
    slow_groups: float = 0.05
    slow_factor: float = 5.0
    lost_every_s: float = 200_000.0
    preempted_every_s: float = 100_000.0
    notice_s: float = 120.0
    back_after_s: float = 300.0
    hangs: float = 0.0005
    poison: float = 0.002
    killers: float = 0.0005
    jitter: float = 0.05


def harm_of(item: WorkItem, weather: Weather) -> str | None:
    """What a row does to each worker that tries it; which rows do follows from their keys alone."""
    seed = random.Random(item.key)
    if seed.random() < weather.killers:
        return "killer"
    return "poison" if seed.random() < weather.poison else None


@dataclass
class Group:
    """One gang of GPUs, and what it does since when."""

    number: int
    layout: ParallelLayout
    node: str
    slowness: float
    asked_s: float
    born: int = 0
    is_ready: bool = False
    is_leaving: bool = False
    item: WorkItem | None = None
    since_s: float = 0.0
    # When what it does now began: the ledger is closed up to here.
    booked_s: float = 0.0
    released_s: float | None = None

    def seat(self, rank: int) -> WorkerSeat:
        asked_ns = round(self.asked_s * S)
        return WorkerSeat("run-1", f"gpu-{self.number}-{rank}", "n", f"group-{self.number}", rank, asked_ns)


@dataclass
class SimulatedPool:
    """Gangs on `num_nodes` nodes of `gpus_per_node` GPUs, moved as `pipeline/cluster/balance.py` says."""

    num_nodes: int
    gpus_per_node: int
    weather: Weather
    generator: random.Random
    now_s: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _out: deque[PoolEvent] = field(default_factory=deque)
    _groups: list[Group] = field(default_factory=list)
    _past: list[Group] = field(default_factory=list)
    _free: dict[ParallelLayout, dict[int, Group]] = field(default_factory=dict)
    _closed: list[LedgerEntry] = field(default_factory=list)
    _seats: list[WorkerSeat] = field(default_factory=list)
    _count: int = 0
    _wanted: Mapping[ParallelLayout, int] = field(default_factory=dict)
    _num_spare: int = 0
    # GPUs of each node that were taken away.
    _dark: Counter[str] = field(default_factory=Counter)
    # What the last moves were made for: nothing moves until that has changed.
    _moved_for: object = None
    _num_changes: int = 0
    _num_room_changes: int = 0
    _held: Counter[ParallelLayout] = field(default_factory=Counter)
    _is_started: bool = False

    def now_ns(self) -> int:
        return round(self.now_s * S)

    def start(self) -> None:
        self._is_started = True
        self._move()

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None:
        self._wanted, self._num_spare = workers, num_spare
        if self._is_started:
            self._move()

    def fleet(self) -> Fleet:
        held = {layout: num for layout, num in self._held.items() if num}
        return Fleet(self.num_nodes * self.gpus_per_node, self.gpus_per_node, self.weather.load_s, held)

    def _move(self) -> None:
        most = {layout: self.num_nodes * (self.gpus_per_node // layout.num_gpus) for layout in self._wanted}
        wanted = {layout: min(num, most[layout]) for layout, num in self._wanted.items()}
        while self._moved_for != (now_for := self._moving_facts(wanted)):
            self._moved_for = now_for
            by_name = {str(group.number): group for group in self._groups if not group.is_leaving}
            standing = [
                Standing(name, group.layout, group.node, self._is_idle(group), self._is_idle(group))
                for name, group in by_name.items()
            ]
            # Of a group that leaves, its machine is gone already.
            nodes = {f"n{i}": self.gpus_per_node - self._dark[f"n{i}"] for i in range(self.num_nodes)}
            moves = Balance(standing, {}, nodes, wanted, num_spare=self._num_spare).moves()
            for name in moves.give_back:
                self._release(by_name[name])
            held = Counter[str]()
            for group in self._groups:
                if not group.is_leaving:
                    held[group.node] += group.layout.num_gpus
            for layout in moves.start:
                fitting = [node for node, size in nodes.items() if size - held[node] >= layout.num_gpus]
                if fitting:
                    node = min(fitting, key=lambda node: nodes[node] - held[node])
                    held[node] += layout.num_gpus
                    self._ask(layout, node)

    def _moving_facts(self, wanted: Mapping[ParallelLayout, int]) -> object:
        """What moves depend on. Who is idle matters only where somebody may have to go."""
        held = {layout: num for layout, num in self._held.items() if num}
        someone_may_go = len(held.keys() | wanted.keys()) > 1 or any(
            n > wanted.get(each, 0) for each, n in held.items()
        )
        return wanted, self._num_spare, self._num_room_changes, self._num_changes if someone_may_go else 0

    def _note_room(self, layout: ParallelLayout, num_more: int) -> None:
        self._held[layout] += num_more
        self._num_room_changes += 1

    def _is_idle(self, group: Group) -> bool:
        return group.number in self._free.get(group.layout, {})

    def num_free(self, layout: ParallelLayout) -> int:
        return len(self._free.get(layout, {}))

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        _, group = self._free[item.layout].popitem()
        self._book(group, "idle", None)
        group.item, group.since_s = item, self.now_s
        harm = harm_of(item, self.weather)
        seconds = item.estimate.clip_s * group.slowness * self.generator.lognormvariate(0, self.weather.jitter)
        born = group.born
        if harm == "killer":
            self._at(
                seconds / 2, lambda: self._if_same(group, born, lambda: self._lose(group, "segfault", "WorkerLost"))
            )
        elif harm == "poison":
            self._at(seconds / 2, lambda: self._if_same(group, born, lambda: self._fail(group, item)))
        elif self.generator.random() < self.weather.hangs:
            silent_s = silence_limit_s(item.estimate.longest_step_s, 60.0)
            self._at(
                seconds / 2 + silent_s, lambda: self._if_same(group, born, lambda: self._lose(group, "silent", "Hang"))
            )
        else:
            self._at(seconds, lambda: self._if_same(group, born, lambda: self._finish(group, item)))

    def cancel(self, item: WorkItem) -> None:
        """A cancelled attempt ends within a step."""
        for group in self._groups:
            if group.item is item:
                self._at(item.estimate.longest_step_s, partial(self._cancelled, group, item))

    def drain(self) -> None: ...

    def next_event(self, timeout_s: float) -> PoolEvent | None:
        until_s = self.now_s + timeout_s
        while not self._out and self._events and self._events[0][0] <= until_s:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
        if self._out:
            return self._out.popleft()
        self.now_s = until_s
        return None

    def seats(self) -> list[WorkerSeat]:
        """One of each group that lives."""
        return self._seats

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        taken, self._closed = self._closed, []
        return taken, []

    def stop(self, *, abandon: bool) -> None:
        for group in list(self._groups):
            if group.item is not None:
                self._book(group, "denoise", group.item)
            self._release(group)

    def held_gpu_s(self) -> float:
        """GPU-seconds from each group's request to its release."""
        return sum(group.layout.num_gpus * ((group.released_s or self.now_s) - group.asked_s) for group in self._past)

    def _at(self, in_s: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_s + in_s, self._count, happen))

    def _ask(self, layout: ParallelLayout, node: str) -> None:
        slow = self.generator.random() < self.weather.slow_groups
        group = Group(self._count, layout, node, self.weather.slow_factor if slow else 1.0, self.now_s)
        self._num_changes += 1
        group.booked_s = self.now_s
        self._groups.append(group)
        self._past.append(group)
        self._seats = [*self._seats, group.seat(0)]
        self._at(self.weather.load_s * self.generator.lognormvariate(0, 0.2), lambda: self._loaded(group))
        lost_s = self.generator.expovariate(1 / self.weather.lost_every_s)
        self._at(lost_s, lambda: self._lose(group, "ecc error", "WorkerLost"))
        preempted_s = self.generator.expovariate(1 / self.weather.preempted_every_s)
        self._at(preempted_s, lambda: self._notify(group))

    def _loaded(self, group: Group) -> None:
        if group.released_s is None:
            self._book(group, "weight_load", None)
            group.is_ready = True
            self._set_free(group)

    def _set_free(self, group: Group) -> None:
        if group.is_leaving:
            self._release(group)
        else:
            self._free.setdefault(group.layout, {})[group.number] = group
            self._num_changes += 1
            self._out.append(Freed())

    def _if_same(self, group: Group, born: int, happen: Callable[[], None]) -> None:
        if group.released_s is None and group.born == born and group.item is not None:
            happen()

    def _finish(self, group: Group, item: WorkItem) -> None:
        self._book(group, "clip", item)
        since_ns = round(group.since_s * S)
        self._end(group)
        self._out.append(
            Finished(Rendered(item, asset(item.request.id), Timings(), since_ns, self.now_ns(), item.request.prompt))
        )

    def _fail(self, group: Group, item: WorkItem) -> None:
        self._book(group, "clip", item)
        since_ns = round(group.since_s * S)
        self._end(group)
        self._out.append(Finished(Failed(item, "EngineFault", "NaN", "EngineFault", since_ns, self.now_ns())))

    def _cancelled(self, group: Group, item: WorkItem) -> None:
        if group.item is item and group.released_s is None:
            self._book(group, "clip", item)
            since_ns = round(group.since_s * S)
            self._end(group)
            self._out.append(Finished(Failed(item, "Cancelled", "", "Cancelled", since_ns, self.now_ns())))

    def _end(self, group: Group) -> None:
        group.item = None
        group.born += 1
        self._set_free(group)

    def _lose(self, group: Group, cause: str, fault: str) -> None:
        """The group is gone; another takes its place."""
        if group.released_s is not None:
            return
        held = () if group.item is None else (Held(group.item, round(group.since_s * S)),)
        if group.item is not None:
            self._book(group, "clip", group.item)
        self._release(group)
        self._out.append(WorkerGone(f"group {group.number}: {cause}", held, fault))

    def _notify(self, group: Group) -> None:
        """Its machine will be taken away: it takes no more work, and what it does may end within the notice."""
        if group.released_s is not None:
            return
        group.is_leaving = True
        self._note_room(group.layout, -1)
        self._dark[group.node] += group.layout.num_gpus
        self._at(self.weather.notice_s + self.weather.back_after_s, partial(self._return, group))
        if self._is_idle(group):
            self._release(group)
        else:
            self._at(self.weather.notice_s, lambda: self._lose(group, "preempted", "Preempted"))

    def _return(self, group: Group) -> None:
        self._dark[group.node] -= group.layout.num_gpus
        self._note_room(group.layout, 0)
        self._move()

    def _release(self, group: Group) -> None:
        self._free.get(group.layout, {}).pop(group.number, None)
        if not group.is_leaving:
            self._note_room(group.layout, -1)
        self._book(group, "idle" if group.is_ready else "weight_load", None)
        group.released_s = self.now_s
        self._groups.remove(group)
        self._seats = [seat for seat in self._seats if seat.group_id != f"group-{group.number}"]

    def _book(self, group: Group, state: str, item: WorkItem | None) -> None:
        """Close the ledger of all ranks up to now; a clip's time is split into its states."""
        spans = [(state, 1.0)] if state != "clip" else list(STATES)
        t0_ns, total_ns = round(group.booked_s * S), self.now_ns() - round(group.booked_s * S)
        group.booked_s = self.now_s
        if total_ns <= 0:
            return
        for rank in range(group.layout.num_gpus):
            seat = group.seat(rank)
            at_ns, share = t0_ns, 0.0
            for name, part in spans:
                share += part
                end_ns = t0_ns + round(total_ns * min(share, 1.0))
                if name == spans[-1][0]:
                    end_ns = t0_ns + total_ns
                self._closed.append(
                    ledger_entry(
                        seat, name, at_ns, end_ns, price_id="p", cost_usd=USD_PER_GPU_S * (end_ns - at_ns) / S,
                        id=item.request.id if item else None, attempt=item.attempt if item else None,
                    )
                )  # fmt: skip
                at_ns = end_ns
