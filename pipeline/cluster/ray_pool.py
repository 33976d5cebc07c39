"""The Pool on Ray: gangs of actors, started as the queue needs them, ended as a whole when one rank is lost.

The driver's thread never waits for an actor: answers, ended teardowns and draining nodes all come through one inbox.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray

from pipeline.cluster import placement
from pipeline.cluster.group_start import GroupStart
from pipeline.cluster.node_watch import NodeWatch
from pipeline.cluster.pool import Finished, Freed, Noted, PoolEvent, WorkerBroken, WorkerFactory, WorkerGone
from pipeline.cluster.rank_death import loss_by
from pipeline.cluster.rank_ledger import RankLedger
from pipeline.cluster.rank_report import Report
from pipeline.cluster.ray_session import RaySession
from pipeline.cluster.teardown import Teardown, TornDown
from pipeline.cluster.worker_group import POLL_S, Loss, Rank, WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.errors import PipelineError, WorkerLost
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.work import WorkItem

log = logging.getLogger(__name__)

# Actors wait with their answers so that no more come than one core of the driver bears.
MAX_ANSWERS_PER_S = 200.0
# Placing a gang takes the driver's thread some milliseconds.
MAX_ASKED_AT_ONCE = 16
CHECK_EVERY_S = 0.25
COUNT_NODES_EVERY_S = 5.0
# What an actor may take for its last report: a stop that is in a hurry, and one that waits for the worker's thread.
HURRY_S, PATIENCE_S = 0.6, 12.0
GONE_S = 0.3


class RayPool:
    """A pool of gangs, each with one worker made by `factory`, which is pickled. `now_ns` is the run's clock."""

    def __init__(self, factory: WorkerFactory, plan: WorkerPlan, now_ns: Callable[[], int]) -> None:
        self._plan = plan
        self._starter = GroupStart(factory, plan, now_ns, self._ask, self._note_place, self._note_seat, self._begun)
        self._now_ns = now_ns
        self._session = RaySession(plan.start_timeout_s)
        self._is_up = self._is_started = self._is_over = self._is_draining = self._has_warned = False
        self._groups: dict[str, WorkerGroup] = {}
        self._free: dict[str, WorkerGroup] = {}
        # Ended or being ended; each holds its place until it is torn down.
        self._leaving: dict[str, WorkerGroup] = {}
        self._ledgers: dict[str, RankLedger] = {}
        self._running: dict[str, LedgerEntry] = {}
        self._closed: list[LedgerEntry] = []
        self._seats: list[WorkerSeat] = []
        self._events: deque[PoolEvent] = deque()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._teardown: Teardown | None = None
        self._watch = NodeWatch(lambda draining: self._inbox.put(partial(self._note_drains, draining)))
        self._draining: dict[str, int] = {}
        self._num_asked = self._num_wanted = self._num_spare = self._most = 0
        self._check_at_s = self._count_at_s = 0.0

    def start(self) -> None:
        self._is_started = True
        self._session.open()

    def want(self, num_workers: int, num_spare: int = 0) -> None:
        if num_workers > self._num_wanted:
            self._check_at_s = 0.0
        self._num_wanted, self._num_spare = num_workers, num_spare

    def num_free(self) -> int:
        return len(self._free) if self._is_started else 1

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        """To the worker that has been free for longest; an item that is to be alone, to one that holds nothing else."""
        fit = (group for group in self._free.values() if group.holds_nothing or not item.alone)
        group = next(fit, None) or next(iter(self._free.values()))
        del self._free[group.group_id]
        if group.take(item, self._now_ns()):
            self._send(group, item, tuple(upcoming))

    def cancel(self, item: WorkItem) -> None:
        for group in self._groups.values():
            if any((held.item.key, held.item.attempt) == (item.key, item.attempt) for held in group.held()):
                for rank in group.ranks:
                    self._ask(group, rank, rank.actor.cancel.remote(item))

    def drain(self) -> None:
        self._is_draining = True
        for group in self._groups.values():
            for rank in group.ranks:
                if rank.is_ready:
                    self._ask(group, rank, rank.actor.drain.remote())

    def next_event(self, timeout_s: float) -> PoolEvent | None:
        deadline_s = time.monotonic() + timeout_s
        while not self._events and not self._is_over:
            left_s = max(0.0, deadline_s - time.monotonic())
            try:
                self._advance(left_s)
            except PipelineError as error:
                self._is_over = True
                self._events.append(WorkerBroken(error))
            if time.monotonic() >= deadline_s:
                break
        return self._events.popleft() if self._events else None

    def seats(self) -> list[WorkerSeat]:
        return self._seats

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        closed, self._closed = self._closed, []
        ranks = [rank for group in self._leaving.values() for rank in group.ranks]
        now_ns = self._now_ns()
        ending = [rank.ledger.running(now_ns) for rank in ranks if rank.ledger is not None]
        return closed, [*self._running.values(), *(entry for entry in ending if entry is not None)]

    def stop(self, *, abandon: bool) -> None:
        """Take the last reports, end every actor and see that its process is gone; then leave Ray."""
        self._is_over = True
        self._watch.stop()
        self._take_last_reports(HURRY_S if abandon else PATIENCE_S, abandon)
        if self._teardown is not None:
            self._teardown.stop(self._leaving.values(), GONE_S)
        for group in self._leaving.values():
            self._release(group)
        self._session.close(abandon=abandon)

    def _take_last_reports(self, timeout_s: float, abandon: bool) -> None:
        for group in list(self._groups.values()):
            self._say_farewell(group, abandon)
        deadline_s = time.monotonic() + timeout_s
        while any(group.is_saying_farewell for group in self._leaving.values()):
            try:
                self._inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))()
            except queue.Empty:
                break
        for group in self._leaving.values():
            if not group.is_ended:
                self._events.extend(Finished(outcome) for outcome in group.conclude(float("inf")))

    def _advance(self, timeout_s: float) -> None:
        """Do what is due, then wait for one message; or for Ray itself while it starts."""
        if not self._is_up:
            if not self._session.wait_until_up(timeout_s):
                return
            self._come_up()
        # First what was said: a driver that was kept busy elsewhere must not take its own silence for theirs.
        while not self._inbox.empty():
            self._inbox.get()()
        if time.monotonic() >= self._check_at_s:
            self._check_at_s = time.monotonic() + CHECK_EVERY_S
            self._balance()
            self._check_places()
            for group in list(self._groups.values()):
                self._look_at(group)
            for group in self._leaving.values():
                self._end_if_silent(group)
        if self._events:
            return
        try:
            self._inbox.get(timeout=min(timeout_s, CHECK_EVERY_S))()
        except queue.Empty:
            return

    def _come_up(self) -> None:
        self._is_up = True
        self._plan.refuse_nodes(sum(1 for node in ray.nodes() if node["Alive"]))
        self._teardown = Teardown(lambda done: self._inbox.put(partial(self._torn_down, done)))
        self._watch.start()

    def _balance(self) -> None:
        """Start missing workers, give back surplus ones.

        An idle worker is kept for as long as its start took: then neither keeping it nor starting another for work
        that comes later costs more than twice what a prophet would pay.
        """
        now_s = time.monotonic()
        if now_s >= self._count_at_s:
            self._count_at_s = now_s + COUNT_NODES_EVERY_S
            self._most = self._plan.num_workers or placement.capacity(self._plan, self._draining)
        staying = [group for group in self._groups.values() if not group.is_draining]
        num_ending = sum(1 for group in self._leaving.values() if not group.is_draining)
        target = min(self._num_wanted, self._most)
        num_missing = min(target - len(staying), self._most - len(staying) - num_ending)
        for _ in range(min(num_missing, MAX_ASKED_AT_ONCE)):
            group = self._starter.start(self._num_asked)
            self._num_asked += 1
            self._groups[group.group_id] = group
        spare = [group for group in reversed(staying) if group.is_spare(now_s)]
        spare.sort(key=lambda group: group.is_placed)
        useless = [group for group in self._groups.values() if group.is_draining and group.holds_nothing]
        for group in [*useless, *spare[: max(0, len(staying) - target - self._num_spare)]]:
            self._give_back(group)

    def _ask(self, group: WorkerGroup, rank: Rank, ref: Any, then: Callable[..., None] | None = None) -> None:
        """Have the answer of `ref` given to `then` on the driver's thread."""
        answered = partial(self._hear, group, rank, then)
        ref.future().add_done_callback(lambda answer: self._inbox.put(partial(answered, answer)))

    def _hear(self, group: WorkerGroup, rank: Rank, then: Callable[..., None] | None, answer: Future[Any]) -> None:
        error = answer.exception()
        if group.is_ended:
            return
        if error is None:
            if then is not None:
                then(group, rank, answer.result())
        elif group.is_leaving:
            rank.due_s, rank.is_awaited = None, False
            self._end_if_silent(group)
        else:
            self._lose(group, loss_by(error, group, rank))

    def _note_place(self, group: WorkerGroup) -> None:
        assert self._teardown is not None and group.node_id is not None, "it was greeted"
        self._teardown.prepare(group.node_id)
        if group.node_id in self._draining:
            self._note_drains(self._draining)

    def _note_seat(self, ledger: RankLedger) -> None:
        self._ledgers[ledger.seat.gpu_id] = ledger
        self._note_seats()

    def _begun(self, group: WorkerGroup, rank: Rank) -> None:
        if self._is_draining:
            self._ask(group, rank, rank.actor.drain.remote())
        self._poll(group, rank, 0.0)

    def _poll(self, group: WorkerGroup, rank: Rank, timeout_s: float) -> None:
        rank.due_s = None
        if not self._is_over and not group.is_leaving:
            rank.due_s = time.monotonic() + timeout_s
            self._ask(group, rank, rank.actor.poll.remote(timeout_s), self._report)

    def _report(self, group: WorkerGroup, rank: Rank, report: Report) -> None:
        num_actors = len(self._groups) * self._plan.num_ranks
        self._poll(group, rank, max(POLL_S, num_actors / MAX_ANSWERS_PER_S))
        self._take(group, rank, report)
        if group.is_leaving:
            self._end_if_silent(group)

    def _take(self, group: WorkerGroup, rank: Rank, report: Report) -> None:
        assert rank.ledger is not None, "it had a seat before its worker"
        rank.ledger.take(report.closed, report.running, report.released_ns)
        self._closed += rank.ledger.take_closed()
        if report.running is not None and not group.is_leaving:
            self._running[rank.gpu_id] = report.running
        was_ready = group.is_ready
        group.hear(rank, report, time.monotonic())
        if group.is_ready and not was_ready and not group.is_leaving:
            seconds = time.monotonic() - group.asked_s
            self._note("worker_ready", group, seconds=round(seconds, 3), start_s=round(group.ready_after_s, 3))
        self._look_at(group)

    def _look_at(self, group: WorkerGroup) -> None:
        """Draw the conclusions of what is known of a worker."""
        now_s = time.monotonic()
        self._events.extend(Finished(outcome) for outcome in group.conclude(now_s))
        if group.is_leaving:
            return
        loss = group.loss(now_s)
        if loss is not None:
            self._lose(group, loss)
            return
        waiting = group.next_waiting()
        if waiting is not None:
            self._send(group, waiting, ())
        if group.is_free and group.group_id not in self._free:
            self._free[group.group_id] = group
            self._events.append(Freed())
        elif not group.is_free:
            self._free.pop(group.group_id, None)

    def _send(self, group: WorkerGroup, item: WorkItem, upcoming: tuple[WorkItem, ...]) -> None:
        for rank in group.ranks:
            self._ask(group, rank, rank.actor.submit.remote(item, upcoming))

    def _lose(self, group: WorkerGroup, loss: Loss) -> None:
        """A rank is lost, or as good as lost: so is its worker, at once."""
        self._retire(group)
        for rank in group.ranks:
            if rank.ledger is not None:
                rank.ledger.lose(self._now_ns())
                self._closed += rank.ledger.take_closed()
        held = group.held()
        self._events.append(
            WorkerBroken(loss.error) if loss.error is not None else WorkerGone(loss.cause, held, loss.fault)
        )
        self._end_group(group)

    def _retire(self, group: WorkerGroup) -> None:
        group.is_leaving = True
        for rank in group.ranks:
            self._running.pop(rank.gpu_id, None)
        del self._groups[group.group_id]
        self._free.pop(group.group_id, None)
        self._leaving[group.group_id] = group

    def _give_back(self, group: WorkerGroup) -> None:
        """Nobody needs it: it says its last, then its place is free for others."""
        if group.is_placed:
            self._note("worker_given_back", group)
        self._say_farewell(group, abandon=True)
        self._end_if_silent(group)

    def _say_farewell(self, group: WorkerGroup, abandon: bool) -> None:
        """Have the last reports of its ranks: the one each was asked for before, and the one of its stop."""
        self._retire(group)
        group.leave_by_s = time.monotonic() + HURRY_S
        if group.has_begun:
            for rank in group.ranks:
                rank.is_awaited = True
                self._ask(group, rank, rank.actor.stop.remote(abandon), self._take_leave)

    def _take_leave(self, group: WorkerGroup, rank: Rank, report: Report) -> None:
        rank.is_awaited = False
        self._take(group, rank, report)
        self._note_seats()
        self._end_if_silent(group)

    def _end_if_silent(self, group: WorkerGroup) -> None:
        """Once its ranks have said their last, or take too long for that, nothing keeps their processes."""
        is_over = not group.is_saying_farewell or time.monotonic() > group.leave_by_s
        if is_over and not group.is_ended and not self._is_over:
            self._end_group(group)

    def _end_group(self, group: WorkerGroup) -> None:
        assert self._teardown is not None, "Ray is up"
        group.is_ended = True
        self._teardown.start(group)

    def _torn_down(self, done: TornDown) -> None:
        group, self._check_at_s = done.group, 0.0
        self._release(group)
        del self._leaving[group.group_id]
        if not group.is_placed:
            return
        cleared = done.cleared
        self._note(
            "worker_torn_down", group, seconds=round(done.place_free_s, 3),
            processes_gone_s=None if cleared is None else round(cleared.processes_gone_s, 3),
            memory_free_s=None if cleared is None or cleared.memory_free_s is None else round(cleared.memory_free_s, 3),
        )  # fmt: skip
        if done.trouble is not None:
            self._events.append(WorkerBroken(WorkerLost(done.trouble)))

    def _release(self, group: WorkerGroup) -> None:
        """Its place is free: the ledgers of its ranks end."""
        for rank in group.ranks:
            if rank.ledger is not None:
                rank.ledger.release(self._now_ns())
                self._closed += rank.ledger.take_closed()
        self._note_seats()

    def _note_drains(self, draining: Mapping[str, int]) -> None:
        """Workers on nodes that are about to go finish what they have and take nothing more."""
        news = [node_id for node_id in draining if node_id not in self._draining]
        self._draining, self._count_at_s = dict(draining), 0.0
        for group in self._groups.values():
            until_ms = draining.get(group.node_id or "")
            if until_ms is not None:
                group.is_draining = True
                group.drained_at_s = time.monotonic() + until_ms / 1e3 - time.time() if until_ms else None
                self._free.pop(group.group_id, None)
        for node_id in news:
            groups = [group.group_id for group in self._groups.values() if group.node_id == node_id]
            left_s = round(draining[node_id] / 1e3 - time.time(), 1) if draining[node_id] else None
            self._events.append(Noted("node_draining", {"node": node_id, "left_s": left_s, "groups": groups}))

    def _check_places(self) -> None:
        """If no worker found a place in time the job ends. If some did it goes on, and the others may still come."""
        late_s = time.monotonic() - self._plan.start_timeout_s
        late = [group for group in self._groups.values() if not group.is_placed and group.asked_s < late_s]
        if not late or (self._has_warned and len(late) < len(self._groups)):
            return
        shortage = placement.shortage(self._plan, len(late), len(self._groups), placement.nodes_now())
        if len(late) == len(self._groups):
            raise PipelineError(shortage)
        self._has_warned = True
        log.warning("going on with fewer workers: %s", shortage)

    def _note(self, event: str, group: WorkerGroup, **facts: Any) -> None:
        self._events.append(Noted(event, {"group": group.group_id, **facts}))

    def _note_seats(self) -> None:
        """Always a new list: who compares it with the last one must see a change."""
        self._seats = [ledger.seat for ledger in self._ledgers.values()]
