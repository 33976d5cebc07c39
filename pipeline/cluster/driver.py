"""The loop of a run: hand out work, hear of it, decide, write down. Over a Pool; knows no Ray and no engine.

Every decision is a pure function elsewhere (`planning.queue`, `planning.policy`); this module asks, tells and records.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from pipeline.cluster.pool import Finished, Pool, PoolEvent, WorkerBroken, WorkerGone
from pipeline.cluster.progress import Counts, Progress
from pipeline.errors import Interrupted, PipelineError, UnexpectedFailure, UsageError, WorkerLost
from pipeline.planning.policy import Admission, AfterFailure, after_failure
from pipeline.planning.queue import WorkQueue
from pipeline.records.outcome import (
    Failed,
    LedgerEntry,
    Outcome,
    Rendered,
    RunFacts,
    WorkerSeat,
    failed_row,
    item_row,
    recovered_row,
    rendered_row,
    skipped_row,
)
from pipeline.records.work import WorkItem

# How long the loop sleeps at most, and so how late it notices a signal.
TICK_S = 0.1


class RunLog(Protocol):
    """What a driver writes while it runs (`storage.runs.RunFolder`)."""

    def log(self, event: str, now_ns: int, **facts: Any) -> None: ...

    def set_workers(self, seats: list[WorkerSeat]) -> None: ...

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None: ...


@dataclass
class StopRequest:
    """Set by a signal handler; the loop looks at it between two ticks."""

    reason: str | None = None


@dataclass
class Ending:
    """How the loop ended: the rows that changed, why it stopped early (if it did), and every ledger entry."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rendered_attempts: dict[str, int] = field(default_factory=dict)
    entries: list[LedgerEntry] = field(default_factory=list)
    stopped_by: PipelineError | None = None
    limit_reached: str | None = None


@dataclass
class Driver:
    """Runs `queue` on `pool` until it is empty, a limit is reached, or somebody asks to stop."""

    queue: WorkQueue
    pool: Pool
    log: RunLog
    facts: RunFacts
    admission: Admission
    stop: StopRequest
    counts: Counts
    progress: Progress
    now_ns: Callable[[], int]
    flush_every_s: float
    # The commit record of an item, if there is one: a lost worker may have ended its item without saying so.
    committed: Callable[[WorkItem], Mapping[str, Any] | None] = lambda item: None
    # Told of each key that is rendered.
    on_rendered: Callable[[str], None] = lambda key: None
    ending: Ending = field(default_factory=Ending)
    _estimated_usd: float = 0.0
    _flushed_s: float = 0.0
    _seats: list[WorkerSeat] = field(default_factory=list)
    _kills: Counter[str] = field(default_factory=Counter)

    def drive(self) -> Ending:
        """The whole run. Afterwards every worker is released and the ledger is closed.

        What stops the run early is in the ending, not raised, so that the books can still be closed.
        """
        started = False
        try:
            while not self.queue.is_empty and self.ending.stopped_by is None:
                if self.stop.reason is not None:
                    self.ending.stopped_by = Interrupted(self.stop.reason)
                    break
                if not started and self._admit(start_only=True):
                    self.pool.start()
                    started = True
                    self._flush()
                self._admit()
                if self.ending.limit_reached is not None and not self.queue.in_flight:
                    break
                self._apply(self.pool.next_event(TICK_S))
                self._note_seats()
                self._flush_if_due()
                self._show()
        except PipelineError as error:
            self.ending.stopped_by = error
        finally:
            self._close(started)
        return self.ending

    def _admit(self, *, start_only: bool = False) -> bool:
        """Hand out work while a worker is free and the limits allow it; says if there was something to start."""
        while self.ending.limit_reached is None and self.pool.num_free() > 0:
            item = self.queue.peek()
            if item is None:
                return False
            refusal = self._refusal(item)
            if refusal is not None:
                self.ending.limit_reached = refusal
                self.log.log("limit_reached", self.now_ns(), reason=refusal)
                return False
            if start_only:
                return True
            self.queue.hand_out()
            self.log.log("attempt_started", self.now_ns(), id=item.request.id, key=item.key, attempt=item.attempt)
            self.pool.submit(item)
        return False

    def _refusal(self, item: WorkItem) -> str | None:
        """Why `item` may not start. Estimates are scaled by what the clips so far really took."""
        ratio = self.counts.spent_usd / self._estimated_usd if self._estimated_usd > 0 else 1.0
        in_flight_usd = sum(other.estimate.cost_usd for other in self.queue.in_flight)
        return self.admission.refusal(
            spent_usd=self.counts.spent_usd,
            in_flight_usd=in_flight_usd * ratio,
            next_usd=item.estimate.cost_usd * ratio,
            next_s=item.estimate.gpu_seconds * ratio,
            now_ns=self.now_ns(),
        )

    def _apply(self, event: PoolEvent | None) -> None:
        match event:
            case Finished(outcome):
                self._settle(outcome)
                self._flush()
            case WorkerBroken(error):
                self._lose_worker(error)
            case WorkerGone():
                self._take_back_from(event)
                self._flush()
            case None:
                pass

    def _settle(self, outcome: Outcome) -> None:
        if isinstance(outcome, Rendered):
            self._settle_rendered(outcome)
            return
        decision = after_failure(outcome.fault, outcome.item.attempt)
        self.log.log(
            "attempt_failed", self.now_ns(), id=outcome.item.request.id, attempt=outcome.item.attempt,
            error_class=outcome.error_class, error_message=outcome.error_message, next=decision.value,
        )  # fmt: skip
        if decision is AfterFailure.RETRY:
            self.queue.take_back(outcome.item.next_attempt())
        elif decision is AfterFailure.SET_ASIDE:
            self._set_aside(outcome)
        else:
            self.queue.take_back(outcome.item.next_attempt())
            unusable = outcome.fault == UsageError.__name__
            self.ending.stopped_by = (UsageError if unusable else PipelineError)(outcome.error_message)

    def _settle_rendered(self, rendered: Rendered) -> None:
        self._settle_row(rendered.item, rendered_row(rendered, self.facts))

    def _settle_row(self, item: WorkItem, row: dict[str, Any]) -> None:
        self._record("rendered", row)
        self.on_rendered(item.key)
        self.ending.rendered_attempts[item.request.id] = row["attempts"]
        self._estimated_usd += item.estimate.cost_usd
        self.counts.num_rendered += 1
        for twin in self.queue.settle(item):
            self._record("skipped", skipped_row(twin, row, self.facts))
            self.counts.num_skipped += 1
            self.counts.num_to_render -= 1

    def _take_back_from(self, gone: WorkerGone) -> None:
        """The item of a lost worker: rendered, if its commit stands; else it counts as a failed attempt."""
        item = gone.item
        held = {} if item is None else {"id": item.request.id, "attempt": item.attempt}
        self.log.log("worker_lost", self.now_ns(), cause=gone.cause, **held)
        if item is None or self._settle_if_committed(item):
            return
        self._kills[item.key] += 1
        kills = self._kills[item.key]
        message = f"killed {kills} worker{'s' if kills > 1 else ''}: {gone.cause}"
        name = WorkerLost.__name__
        self._settle(Failed(item, name, message, name, gone.since_ns, max(gone.since_ns, self.now_ns())))

    def _settle_if_committed(self, item: WorkItem) -> bool:
        record = self.committed(item)
        if record is None or record["run_id"] != self.facts.run_id:
            return False
        self._settle_row(item, recovered_row(item, record, self.facts))
        return True

    def _set_aside(self, failed: Failed) -> None:
        self.queue.set_aside(failed.item)
        self._record("failed", failed_row(failed, self.facts))
        self.counts.num_failed += 1

    def _record(self, event: str, row: dict[str, Any]) -> None:
        self.ending.rows.append(row)
        self.log.log(event, self.now_ns(), id=row["id"], row=row)

    def _lose_worker(self, error: BaseException) -> None:
        """No worker can be had, or none can be set up: the job ends, with the code that the error carries."""
        for item in self.queue.in_flight:
            self.queue.take_back(item)
        if isinstance(error, PipelineError):
            self.ending.stopped_by = error
            return
        bug = UnexpectedFailure(f"the worker could not be set up: {type(error).__name__}: {error}")
        bug.__cause__ = error
        self.ending.stopped_by = bug

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._flushed_s >= self.flush_every_s:
            self._flush()

    def _flush(self) -> None:
        """Write the ledger up to now and renew the lease; what this wrote survives any kill."""
        self._flushed_s = time.monotonic()
        self._note_seats()
        closed, running = self.pool.take_ledger()
        self._count(closed)
        self.log.write_ledger(closed, running, self.now_ns())

    def _note_seats(self) -> None:
        """Write down who is held before what they do: whoever closes a dead run goes by the seats."""
        seats = self.pool.seats()
        if seats != self._seats:
            self._seats = seats
            self.log.set_workers(seats)

    def _count(self, closed: list[LedgerEntry]) -> None:
        self.ending.entries.extend(closed)
        self.counts.spent_usd += float(sum((entry.cost_usd for entry in closed), Decimal(0)))

    def _show(self) -> None:
        self.counts.num_running = len(self.queue.in_flight)
        self.progress.show(self.counts)

    def _close(self, started: bool) -> None:
        """Release the workers and give every row that was not settled its own."""
        if started:
            self._settle_what_is_finished()
            self.pool.stop(abandon=self.ending.stopped_by is not None)
            try:
                self._settle_what_is_finished()
                self._flush()
            except PipelineError as error:
                self.ending.stopped_by = self.ending.stopped_by or error
        in_flight = {item.key for item in self.queue.in_flight}
        for item in self.queue.unfinished():
            row = item_row(item, self.facts, status="not_started")
            row["attempts"] = item.attempt if item.key in in_flight else item.attempt - 1
            self.ending.rows.append(row)
        self.counts.num_running = 0
        self.progress.show(self.counts, last=True)

    def _settle_what_is_finished(self) -> None:
        """A clip that was committed between the last look and the stop is rendered, not given up."""
        try:
            while (event := self.pool.next_event(0)) is not None:
                if isinstance(event, Finished) and isinstance(event.outcome, Rendered):
                    self._settle(event.outcome)
                elif isinstance(event, WorkerGone) and event.item is not None:
                    self._settle_if_committed(event.item)
        except PipelineError as error:
            self.ending.stopped_by = self.ending.stopped_by or error
