"""The Pool on Ray: gangs of actors of several sizes, started as the queue needs them, ended as a whole when one rank is
lost.

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

from pipeline.cluster.group_start import GroupStart
from pipeline.cluster.node_watch import NodeWatch
from pipeline.cluster.pool import Finished, Freed, Held, Noted, PoolEvent, WorkerBroken, WorkerFactory, WorkerGone
from pipeline.cluster.pool_ledger import PoolLedger
from pipeline.cluster.rank_death import loss_by
from pipeline.cluster.rank_report import Report
from pipeline.cluster.ray_session import RaySession
from pipeline.cluster.restarts import Restarts
from pipeline.cluster.room import Room
from pipeline.cluster.staffing import Staffing
from pipeline.cluster.teardown import Teardown, TornDown
from pipeline.cluster.worker_group import POLL_S, Loss, Rank, WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.errors import Cancelled, PipelineError, Preempted, WorkerLost
from pipeline.planning.timetable import Fleet
from pipeline.records.outcome import Failed, LedgerEntry, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem

log = logging.getLogger(__name__)

# Ranks without news wait with their reports, each of which costs the driver 0.3 ms of CPU: so long that no more than
# this come in a second from all leaders, nor from all ranks, but no longer than that. With the 2 s between two flushes
# of the ledger a killed driver leaves less than 5 s of a rank unwritten; 1,000 gangs of 8 then take 1.3 of its cores.
REPORTS_PER_S = 200.0
MAX_POLL_S = 2.0
# Placing a gang takes the driver's thread some milliseconds.
MAX_ASKED_AT_ONCE = 16
CHECK_EVERY_S = 0.25
# What an actor may take for its last report: a stop that is in a hurry, and one that waits for the worker's thread.
HURRY_S, PATIENCE_S = 0.6, 12.0
GONE_S = 0.3


class RayPool:
    """A pool of gangs, each with one worker made by `factory`, which is pickled. `now_ns` is the run's clock."""

    def __init__(self, factory: WorkerFactory, plan: WorkerPlan, now_ns: Callable[[], int]) -> None:
        self._plan = plan
        self._ledger = PoolLedger(now_ns)
        self._starter = GroupStart(factory, plan, now_ns, self._ask, self._note_place, self._ledger.add, self._begun)
        self._now_ns = now_ns
        self._session = RaySession(plan.start_timeout_s)
        self._is_up = self._is_started = self._is_over = self._is_draining = False
        self._groups: dict[str, WorkerGroup] = {}
        # Ended or being ended; each holds its place until it is torn down.
        self._leaving: dict[str, WorkerGroup] = {}
        self._events: deque[PoolEvent] = deque()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._teardown: Teardown | None = None
        self._watch = NodeWatch(lambda draining: self._inbox.put(partial(self._note_drains, draining)))
        self._draining: dict[str, int] = {}
        self._room, self._restarts = Room(plan), Restarts()
        self._staffing = Staffing(plan)
        self._check_at_s = 0.0

    def start(self) -> None:
        self._is_started = True
        self._session.open()

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None:
        if self._staffing.want(workers, num_spare):
            self._check_at_s = 0.0

    def fleet(self) -> Fleet | None:
        if not self._is_up:
            return None
        nodes = self._room.nodes(self._draining, time.monotonic())
        return self._staffing.fleet(self._groups.values(), nodes, self._room.widest)

    def num_free(self, layout: ParallelLayout) -> int:
        return self._staffing.num_free(layout)

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        group = self._staffing.take_free(item)
        if group.take(item, self._now_ns()):
            self._send(group, item, tuple(upcoming))

    def cancel(self, item: WorkItem) -> None:
        for group in self._groups.values():
            waiting = group.withdraw(item)
            if waiting is not None:
                self._hand_back(waiting, Cancelled("given up before its start, as the driver asked"))
            elif any(held.item.is_attempt(item.key, item.attempt) for held in group.held()):
                for rank in group.ranks:
                    self._ask(group, rank, rank.actor.cancel.remote(item))

    def drain(self) -> None:
        self._is_draining = True
        for group in self._groups.values():
            for rank in group.ranks:
                if rank.has_begun:
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
        return self._ledger.seats

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        return self._ledger.take(self._leaving.values())

    def stop(self, *, abandon: bool) -> None:
        """Take the last reports, end every actor and see that its process is gone; then leave Ray."""
        self._is_over = True
        self._watch.stop()
        self._take_last_reports(HURRY_S if abandon else PATIENCE_S, abandon)
        if self._teardown is not None:
            self._teardown.stop([*self._leaving.values(), *self._room.spoilt], GONE_S)
        for group in self._leaving.values():
            self._ledger.release(group)
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
            self._room.check(self._groups.values(), time.monotonic(), is_any_leaving=bool(self._leaving))
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

        An idle worker is kept for as long as its start took, unless another needs its GPUs: then neither keeping it nor
        starting another for work that comes later costs more than twice what a prophet would pay.
        """
        now_s, staffing = time.monotonic(), self._staffing
        nodes = self._room.nodes(self._draining, now_s)
        moves = staffing.moves(self._groups.values(), self._leaving.values(), nodes, now_s)
        for layout in moves.start[:MAX_ASKED_AT_ONCE] if self._restarts.may_start(now_s) else ():
            group = self._starter.start(staffing.num_asked, layout, staffing.num_ranks_asked)
            staffing.note_asked(layout)
            self._groups[group.group_id] = group
        useless = [group for group in self._groups.values() if group.is_draining and group.holds_nothing]
        for group in [*useless, *(self._groups[name] for name in moves.give_back)]:
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
        self._room.move(time.monotonic())
        if group.node_id in self._draining:
            self._note_drains(self._draining)

    def _begun(self, group: WorkerGroup, rank: Rank) -> None:
        rank.has_begun = True
        if self._is_draining:
            self._ask(group, rank, rank.actor.drain.remote())
        self._poll(group, rank, 0.0)

    def _poll(self, group: WorkerGroup, rank: Rank, timeout_s: float) -> None:
        rank.due_s = None
        if not self._is_over and not group.is_leaving:
            rank.due_s = time.monotonic() + timeout_s
            self._ask(group, rank, rank.actor.poll.remote(timeout_s), self._report)

    def _report(self, group: WorkerGroup, rank: Rank, report: Report) -> None:
        # All ranks are as many as if each group had the ranks of this one: near enough for a pace.
        num_reporting = len(self._groups) * (len(group.ranks) if rank.index else 1)
        self._poll(group, rank, min(MAX_POLL_S, max(POLL_S, num_reporting / REPORTS_PER_S)))
        self._take(group, rank, report)
        if group.is_leaving:
            self._end_if_silent(group)

    def _take(self, group: WorkerGroup, rank: Rank, report: Report) -> None:
        self._ledger.hear(rank, report, is_leaving=group.is_leaving)
        was_ready = group.is_ready
        group.hear(rank, report, time.monotonic())
        if group.is_ready and not was_ready and not group.is_leaving:
            seconds = time.monotonic() - group.asked_s
            self._restarts.worker_ready()
            self._staffing.note_load(group.ready_after_s)
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
        if group.is_draining and (waiting := group.withdraw()) is not None:
            self._hand_back(waiting, Preempted(f"{group.group_id}: its node is being taken away"))
        elif (next_up := group.next_waiting()) is not None:
            self._send(group, next_up, ())
        if self._staffing.note_free(group):
            self._events.append(Freed())

    def _send(self, group: WorkerGroup, item: WorkItem, upcoming: tuple[WorkItem, ...]) -> None:
        for rank in group.ranks:
            self._ask(group, rank, rank.actor.submit.remote(item, upcoming))

    def _lose(self, group: WorkerGroup, loss: Loss) -> None:
        """A rank is lost, or as good as lost: so is its worker, at once."""
        self._retire(group)
        self._ledger.lose(group)
        self._events.append(self._verdict(group, loss))
        if not group.is_ready:
            self._restarts.worker_lost(time.monotonic())
        self._end_group(group)

    def _verdict(self, group: WorkerGroup, loss: Loss) -> WorkerBroken | WorkerGone:
        """If the job can go on without the worker."""
        if loss.error is not None:
            others_start = any(other.is_placed for other in self._groups.values())
            if self._restarts.ends_job(loss.error, others_start=others_start):
                return WorkerBroken(loss.error)
            if not isinstance(loss.error, PipelineError):
                log.warning("%s could not be set up", group.group_id, exc_info=loss.error)
        return WorkerGone(loss.cause, group.held(), loss.fault)

    def _hand_back(self, held: Held, error: PipelineError) -> None:
        """An item ends without having been anywhere but here."""
        fault = type(error).__name__
        self._events.append(Finished(Failed(held.item, fault, str(error), fault, held.since_ns, self._now_ns())))

    def _retire(self, group: WorkerGroup) -> None:
        group.is_leaving = True
        self._ledger.retire(group)
        del self._groups[group.group_id]
        self._staffing.note_free(group)
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
        self._ledger.note_seats()
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
        self._room.move(time.monotonic())
        self._ledger.release(group)
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
            self._spoil(group, done.trouble, done.remains)

    def _spoil(self, group: WorkerGroup, trouble: str, remains: Mapping[str, Any]) -> None:
        """Something of the worker is still at its place: what would be started there meets it."""
        self._room.spoil(group)
        self._note("place_spoilt", group, node=group.node_id, trouble=trouble, **remains)
        if not any(other.is_placed for other in self._groups.values()) and self._room.is_none_left(self._draining):
            self._events.append(WorkerBroken(WorkerLost(trouble)))

    def _note_drains(self, draining: Mapping[str, int]) -> None:
        """Workers on nodes that are about to go finish what they have and take nothing more."""
        news = [node_id for node_id in draining if node_id not in self._draining]
        self._draining = dict(draining)
        self._room.count_again()
        for group in self._groups.values():
            until_ms = draining.get(group.node_id or "")
            if until_ms is not None:
                group.is_draining = True
                group.drained_at_s = time.monotonic() + until_ms / 1e3 - time.time() if until_ms else None
                self._staffing.note_free(group)
        for node_id in news:
            groups = [group.group_id for group in self._groups.values() if group.node_id == node_id]
            left_s = round(draining[node_id] / 1e3 - time.time(), 1) if draining[node_id] else None
            self._events.append(Noted("node_draining", {"node": node_id, "left_s": left_s, "groups": groups}))

    def _note(self, event: str, group: WorkerGroup, **facts: Any) -> None:
        self._events.append(Noted(event, {"group": group.group_id, **facts}))
