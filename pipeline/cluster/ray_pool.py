"""The Pool on Ray: one actor a worker, replaced when it dies; the ledger of a dead one is closed here.

The driver's thread never waits for an actor: each actor has one call outstanding, and `next_event` looks which have
been answered.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.actor import Hello, Report, worker_actor
from pipeline.cluster.pool import Finished, PoolEvent, WorkerBroken, WorkerFactory, WorkerGone
from pipeline.cluster.ray_session import RaySession, wait_until_gone
from pipeline.cost.pricing import UnitPrice
from pipeline.errors import PipelineError, WorkerLost
from pipeline.records.outcome import LedgerEntry, WorkerSeat, ledger_entry
from pipeline.records.work import WorkItem

log = logging.getLogger(__name__)

# How long an actor's `poll` waits for news: the ledger's running entries are at most this old.
POLL_S = 0.25
NUM_PINGS = 3
# So many workers lost in a row, with no item ended in between, are not bad luck.
MAX_LOST_IN_A_ROW = 4
# What an actor may take for its last report: a stop that is in a hurry, and one that waits for the worker's thread.
HURRY_S, PATIENCE_S = 0.6, 12.0
GONE_S = 0.3


@dataclass(frozen=True)
class WorkerPlan:
    """What each worker is, and how many. `num_workers` None: as many as the cluster holds, at most `max_useful`."""

    run_id: str
    device: str
    price: UnitPrice
    threads: int
    num_workers: int | None
    max_useful: int
    start_timeout_s: float
    log_level: str = "warning"
    # Called with the number of nodes once it is known; raises if the job cannot run on so many.
    refuse_nodes: Callable[[int], None] = lambda num_nodes: None


@dataclass
class _Hand:
    """One actor as the driver sees it. `answer` takes what its outstanding call `pending` returns."""

    gpu_id: str
    actor: Any
    pending: Any
    answer: Callable[[_Hand, Any], None]
    asked_s: float
    is_up: bool = False
    is_ready: bool = False
    hello: Hello | None = None
    pinged_ns: int = 0
    pings: list[tuple[int, int]] = field(default_factory=list)
    seat: WorkerSeat | None = None
    item: WorkItem | None = None
    item_since_ns: int = 0
    handing_in: Any = None
    running: LedgerEntry | None = None
    closed_to_ns: int = 0


class RayPool:
    """A pool of Ray actors, each with one worker made by `factory`, which is pickled. `now_ns` is the run's clock."""

    def __init__(self, factory: WorkerFactory, plan: WorkerPlan, now_ns: Callable[[], int]) -> None:
        self._factory = factory
        self._plan = plan
        self._now_ns = now_ns
        self._session = RaySession(plan.start_timeout_s)
        self._is_up = self._is_started = self._is_over = self._has_warned = False
        self._hands: list[_Hand] = []
        self._seats: dict[str, WorkerSeat] = {}
        self._closed: list[LedgerEntry] = []
        self._events: deque[PoolEvent] = deque()
        self._num_asked = self._num_wanted = self._num_lost_in_a_row = 0

    def start(self) -> None:
        self._is_started = True
        self._session.open()

    def num_free(self) -> int:
        return len(self._free()) if self._is_started else 1

    def submit(self, item: WorkItem) -> None:
        hand = self._free()[0]
        hand.item, hand.item_since_ns = item, self._now_ns()
        hand.handing_in = hand.actor.submit.remote(item)

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
        return list(self._seats.values())

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        taken, self._closed = self._closed, []
        return taken, [hand.running for hand in self._hands if hand.running is not None]

    def stop(self, *, abandon: bool) -> None:
        """Take the last reports, end every actor and see that its process is gone; then leave Ray."""
        self._is_over = True
        self._take_last_reports(HURRY_S if abandon else PATIENCE_S, abandon)
        hands, self._hands = self._hands, []
        for hand in hands:
            self._close_seat(hand)
        self._end(hands)
        self._session.close(abandon=abandon)

    def _take_last_reports(self, timeout_s: float, abandon: bool) -> None:
        """Both of each worker: the one it was asked for before, which took entries along, and the one of its stop."""
        held = [hand for hand in self._hands if hand.seat is not None]
        asked = {ref: hand for hand in held for ref in (hand.pending, hand.actor.stop.remote(abandon))}
        if not asked:
            return
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        for ref in (ref for ref in asked if ref in answered):
            try:
                report = ray.get(ref)
            except RayError:
                continue  # it died meanwhile; closed like any dead worker
            if isinstance(report, Report):
                self._take(asked[ref], report)

    def _free(self) -> list[_Hand]:
        return [hand for hand in self._hands if hand.is_ready and hand.item is None]

    def _advance(self, timeout_s: float) -> None:
        """Wait for one answer of an actor, or of Ray itself while it starts."""
        if not self._is_up:
            if not self._session.wait_until_up(timeout_s):
                return
            self._is_up = True
            self._plan.refuse_nodes(sum(1 for node in ray.nodes() if node["Alive"]))
            self._num_wanted = self._plan.num_workers or self._auto_workers()
            for _ in range(self._num_wanted):
                self._ask()
        self._check_late_starters()
        waiting = {ref: hand for hand in self._hands for ref in (hand.pending, hand.handing_in) if ref is not None}
        if not waiting:
            return
        answered, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        for ref in answered:
            self._hear(waiting[ref], ref)

    def _auto_workers(self) -> int:
        total = ray.cluster_resources().get("GPU" if self._plan.device == "cuda" else "CPU", 0)
        return max(1, min(int(total), self._plan.max_useful))

    def _ask(self) -> None:
        """Ask the cluster for one more worker."""
        on_gpu = self._plan.device == "cuda"
        actor = worker_actor(
            num_cpus=0 if on_gpu else 1, num_gpus=1 if on_gpu else 0, threads=self._plan.threads, folder=str(Path.cwd())
        )
        gpu_id = f"{self._plan.device}-{self._num_asked}"
        self._num_asked += 1
        hand = _Hand(gpu_id, actor, actor.hello.remote(), self._greet, time.monotonic())
        self._hands.append(hand)

    def _hear(self, hand: _Hand, ref: Any) -> None:
        if hand not in self._hands:
            return
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            self._events.append(WorkerBroken(_as_ours(hand, error)))
            self._lose(hand, "it could not go on")
            return
        except RayError as error:
            self._lose(hand, _cause_of(error))
            self._replace(hand, _cause_of(error))
            return
        if ref == hand.handing_in:
            hand.handing_in = None
        else:
            hand.answer(hand, value)

    def _greet(self, hand: _Hand, hello: Hello) -> None:
        hand.hello, hand.is_up, hand.answer = hello, True, self._compare_clocks
        self._ping(hand)

    def _ping(self, hand: _Hand) -> None:
        hand.pinged_ns = self._now_ns()
        hand.pending = hand.actor.now_ns.remote()

    def _compare_clocks(self, hand: _Hand, theirs_ns: int) -> None:
        """The offset of the driver's clock from the actor's, from the shortest of a few round trips."""
        trip_ns = self._now_ns() - hand.pinged_ns
        hand.pings.append((trip_ns, hand.pinged_ns + trip_ns // 2 - theirs_ns))
        if len(hand.pings) < NUM_PINGS:
            self._ping(hand)
            return
        assert hand.hello is not None
        offset_ns = min(hand.pings)[1]
        hand.seat = WorkerSeat(
            run_id=self._plan.run_id,
            gpu_id=hand.gpu_id,
            node_id=hand.hello.node_name,
            group_id=f"group-{hand.gpu_id.rpartition('-')[2]}",
            rank=0,
            acquired_ns=hand.hello.born_ns + offset_ns,
        )
        hand.closed_to_ns = hand.seat.acquired_ns
        self._seats[hand.gpu_id] = hand.seat
        hand.pending = hand.actor.begin.remote(
            self._factory, hand.seat, self._plan.price, offset_ns, self._plan.log_level
        )
        hand.answer = self._begun

    def _begun(self, hand: _Hand, nothing: None) -> None:
        hand.answer = self._report
        hand.pending = hand.actor.poll.remote(0.0)

    def _report(self, hand: _Hand, report: Report) -> None:
        hand.pending = hand.actor.poll.remote(POLL_S)
        self._take(hand, report)

    def _take(self, hand: _Hand, report: Report) -> None:
        for event in report.events:
            self._events.append(event)
            if isinstance(event, Finished):
                hand.item = None
                self._num_lost_in_a_row = 0
        self._closed.extend(report.closed)
        hand.closed_to_ns = max([hand.closed_to_ns, *(entry.t1_ns for entry in report.closed)])
        hand.running, hand.is_ready = report.running, report.is_ready
        if report.released_ns is not None and hand.seat is not None:
            self._seats[hand.gpu_id] = hand.seat = replace(hand.seat, released_ns=report.released_ns)

    def _lose(self, hand: _Hand, cause: str) -> None:
        self._hands.remove(hand)
        self._close_seat(hand)
        self._end([hand])
        self._events.append(WorkerGone(f"{hand.gpu_id}: {cause}", hand.item, hand.item_since_ns))

    def _replace(self, hand: _Hand, cause: str) -> None:
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row >= MAX_LOST_IN_A_ROW:
            raise WorkerLost(
                f"{self._num_lost_in_a_row} workers in a row were lost before any ended an item, the last "
                f"{hand.gpu_id}: {cause}; see the logs of Ray, then run the same command again"
            )
        self._ask()

    def _close_seat(self, hand: _Hand) -> None:
        """The ledger of a worker that can report no more: what it last said, then `unknown` up to now."""
        seat, running, hand.running = hand.seat, hand.running, None
        if seat is None or seat.released_ns is not None:
            return
        known_ns = hand.closed_to_ns
        if running is not None:
            self._closed.append(running)
            known_ns = running.t1_ns
        released_ns = max(known_ns, self._now_ns())
        if released_ns > known_ns:
            price = self._plan.price
            cost_usd = price.cost(released_ns - known_ns)
            self._closed.append(
                ledger_entry(seat, "unknown", known_ns, released_ns, price_id=price.price_id, cost_usd=cost_usd)
            )
        self._seats[hand.gpu_id] = hand.seat = replace(seat, released_ns=released_ns)

    def _end(self, hands: list[_Hand]) -> None:
        """Kill the actors; those of this node are seen to be gone, so that a GPU is free for the next."""
        if not hands:
            return
        for hand in hands:
            ray.kill(hand.actor, no_restart=True)
        here = ray.get_runtime_context().get_node_id()
        pids = [hand.hello.pid for hand in hands if hand.hello is not None and hand.hello.ray_node_id == here]
        wait_until_gone(pids, GONE_S)

    def _check_late_starters(self) -> None:
        """If no worker found a place in time the job ends. If some did it goes on, and the others may still come."""
        late_s = time.monotonic() - self._plan.start_timeout_s
        late = [hand for hand in self._hands if not hand.is_up and hand.asked_s < late_s]
        if not late:
            return
        if len(late) == len(self._hands):
            raise PipelineError(self._shortage(len(late)))
        if not self._has_warned:
            self._has_warned = True
            log.warning("going on with fewer workers: %s", self._shortage(len(late)))

    def _shortage(self, num_late: int) -> str:
        kind = "GPU" if self._plan.device == "cuda" else "CPU"
        total, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in ("GPU", "CPU"))
        return (
            f"{num_late} of {self._num_wanted} workers found no place within {self._plan.start_timeout_s:g} s; each "
            f"asks for 1 {kind}, and the cluster has {there}; free some, ask for fewer (cluster.num_workers), or wait "
            "longer (cluster.start_timeout_s)"
        )


def _cause_of(error: BaseException) -> str:
    """One line of what Ray says of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "Error" in line]
    return (telling or lines or [type(error).__name__])[-1][:300]


def _as_ours(hand: _Hand, error: RayTaskError) -> PipelineError:
    cause = error.cause if isinstance(error.cause, Exception) else error
    if isinstance(cause, PipelineError):
        return cause
    reason = str(cause).partition("\n")[0]
    return WorkerLost(
        f"worker {hand.gpu_id} could not start: {type(cause).__name__}: {reason}; "
        "this checkout must lie at the same path on every node, or be submitted with the job"
    )
