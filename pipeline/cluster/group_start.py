"""The start of a worker's ranks: asked for, greeted, their clocks compared, given their worker to build.

Every step is the answer to a call; `ask` has it given to the next one on the driver's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.cluster import placement
from pipeline.cluster.actor import rank_actor
from pipeline.cluster.pool import WorkerFactory
from pipeline.cluster.rank_ledger import RankLedger
from pipeline.cluster.rank_report import Hello
from pipeline.cluster.worker_group import NUM_PINGS, Rank, WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.records.parallel import ParallelLayout


class Ask(Protocol):
    """Have the answer to a call, `ref`, given to `then` with its group and rank."""

    def __call__(self, group: WorkerGroup, rank: Rank, ref: Any, then: Callable[..., None] | None = None) -> None: ...


@dataclass
class GroupStart:
    """Starts workers. `on_placed` hears of a group's first rank, `on_seat` of each rank that is held from now on,
    `on_begun` of each that builds its worker."""

    factory: WorkerFactory
    plan: WorkerPlan
    now_ns: Callable[[], int]
    ask: Ask
    on_placed: Callable[[WorkerGroup], None]
    on_seat: Callable[[RankLedger], None]
    on_begun: Callable[[WorkerGroup, Rank], None]

    def start(self, number: int, layout: ParallelLayout, first_rank: int) -> WorkerGroup:
        """Ask the cluster for the `number`-th worker, whose ranks are counted from `first_rank` over all workers. Its
        actors queue until it has a place."""
        plan = self.plan
        place = placement.ask_for_place(plan, layout.num_gpus)
        on_gpu = plan.device == "cuda"
        ranks = []
        for index in range(layout.num_gpus):
            actor = rank_actor(
                num_cpus=0 if on_gpu else plan.amount,
                num_gpus=plan.amount if on_gpu else 0,
                threads=plan.threads,
                folder=str(Path.cwd()),
                place=placement.seat_in(place, index),
            )
            ranks.append(Rank(index, f"{plan.device}-{first_rank + index}", actor))
        group = WorkerGroup(f"group-{number}", layout, ranks, place, plan, time.monotonic())
        for rank in ranks:
            leads = rank.index == 0 and len(ranks) > 1
            self.ask(group, rank, rank.actor.hello.remote(leads), self._greet)
        return group

    def _greet(self, group: WorkerGroup, rank: Rank, hello: Hello) -> None:
        was_placed, rank.hello = group.is_placed, hello
        if not was_placed:
            group.placed_s = time.monotonic()
            self.on_placed(group)
        self._ping(group, rank)

    def _ping(self, group: WorkerGroup, rank: Rank) -> None:
        rank.pinged_ns, rank.due_s = self.now_ns(), time.monotonic()
        self.ask(group, rank, rank.actor.now_ns.remote(), self._compare_clocks)

    def _compare_clocks(self, group: WorkerGroup, rank: Rank, theirs_ns: int) -> None:
        trip_ns = self.now_ns() - rank.pinged_ns
        rank.pings.append((trip_ns, rank.pinged_ns + trip_ns // 2 - theirs_ns))
        if len(rank.pings) < NUM_PINGS:
            self._ping(group, rank)
            return
        rank.due_s = None
        rank.ledger = RankLedger(group.seat_of(rank), self.plan.price)
        self.on_seat(rank.ledger)
        if all(other.ledger is not None for other in group.ranks) and not group.is_leaving:
            self._begin(group)

    def _begin(self, group: WorkerGroup) -> None:
        group.has_begun = True
        for rank in group.ranks:
            assert rank.ledger is not None, "the last of them was just made"
            rank.due_s = time.monotonic()
            begun = rank.actor.begin.remote(
                self.factory, group.member(rank), rank.ledger.seat, self.plan.price, rank.offset_ns, self.plan.log_level
            )
            self.ask(group, rank, begun, self._begun)

    def _begun(self, group: WorkerGroup, rank: Rank, nothing: None) -> None:
        self.on_begun(group, rank)
