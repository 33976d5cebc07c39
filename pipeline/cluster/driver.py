"""The loop of a run: hand out work, hear of it, decide, write down. Over a Pool; knows no Ray and no engine.

Every decision is a pure function elsewhere (`planning.queue`, `planning.policy`); this module asks, tells and records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from pipeline.cluster.books import Books, RunLog
from pipeline.cluster.dispatch import Dispatch
from pipeline.cluster.ending import Ending, StopRequest
from pipeline.cluster.pool import Finished, Freed, Held, Noted, Pool, PoolEvent, WorkerBroken, WorkerGone
from pipeline.cluster.progress import Counts, Progress
from pipeline.cost.allocation import GIVEN_UP
from pipeline.errors import Hang, Interrupted, PipelineError, UnexpectedFailure, UsageError, WorkerLost
from pipeline.planning.pace import Pace
from pipeline.planning.policy import Admission, AfterFailure, CrashLoop, RowFailures, after_failure, is_nobodys, retried
from pipeline.planning.queue import WorkQueue
from pipeline.records.outcome import (
    NS_PER_S,
    Failed,
    Outcome,
    Rendered,
    RunFacts,
    failed_row,
    item_row,
    recovered_row,
    rendered_row,
    skipped_row,
)
from pipeline.records.work import WorkItem

# How long the loop sleeps at most, and so how late it notices a signal.
TICK_S = 0.1
STRAGGLERS_EVERY_S = 0.5
# Items to prefetch for: their prompts are encoded together where moving the text encoder takes longer than its work.
NUM_UPCOMING = 4
# Why an attempt gave no clip of ours, where no failure class says it.
DUPLICATE = "duplicate"


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
    # Commits what a worker left to the driver to commit, because the store cannot tell two writers apart.
    commit: Callable[[Rendered], Rendered] = lambda rendered: rendered
    # Told of each key that is rendered.
    on_rendered: Callable[[str], None] = lambda key: None
    pace: Pace = field(default_factory=Pace)
    ending: Ending = field(default_factory=Ending)
    _failures: RowFailures = field(default_factory=RowFailures)
    _crashes: CrashLoop = field(default_factory=lambda: CrashLoop(1))
    # Of the clips that ended: what they were estimated at, and what their attempts cost.
    _estimated_usd: float = 0.0
    _taken_usd: float = 0.0
    _stragglers_at_ns: int = 0
    _stop_seen_ns: int | None = None

    def __post_init__(self) -> None:
        self._books = Books(self.pool, self.log, self.ending, self.counts, self.now_ns, self.flush_every_s)
        self._dispatch = Dispatch(self.queue, self.pool, self.pace, self.admission.deadline_ns)

    def drive(self) -> Ending:
        """The whole run. Afterwards every worker is released and the ledger is closed.

        What stops the run early is in the ending, not raised, so that the books can still be closed.
        """
        started = False
        try:
            while not self.queue.is_empty and self.ending.stopped_by is None:
                if self._must_stop():
                    break
                if not started and self._has_work():
                    self._want_workers()
                    self.pool.start()
                    started = True
                    self._books.flush()
                if started:
                    self._admit()
                if self.ending.limit_reached is not None and not self.queue.num_in_flight:
                    break
                self._race_stragglers()
                self._want_workers()
                self._apply(self.pool.next_event(TICK_S))
                self._books.flush_if_due()
                self._show()
        except PipelineError as error:
            # Somebody who asks the run to stop also ends its patience with a store.
            self.ending.stopped_by = error if self.stop.reason is None else Interrupted(self.stop.reason)
        finally:
            self._close(started)
        return self.ending

    def _must_stop(self) -> bool:
        """If what is in flight must be given up now; the first sign of it lets no more work start."""
        if self.stop.reason is None:
            if self.admission.is_over(self.now_ns()):
                self.ending.limit_reached = self.ending.limit_reached or "the deadline has passed"
                return True
            return False
        if self._stop_seen_ns is None:
            self._stop_seen_ns = self.now_ns()
            self.log.log("stopping", self._stop_seen_ns, reason=self.stop.reason, notice_s=self.stop.notice_s)
            self.pool.drain()
        left_s = self.stop.notice_s - (self.now_ns() - self._stop_seen_ns) / NS_PER_S
        if left_s > 0 and any(self.pace.left_s(item, self.now_ns()) <= left_s for item in self.queue.in_flight):
            return False
        self.ending.stopped_by = Interrupted(self.stop.reason)
        return True

    def _has_work(self) -> bool:
        """If the limits let anything start."""
        item = self.queue.peek()
        return item is not None and self._may_start and self._is_within_limits(item)

    def _is_within_limits(self, item: WorkItem) -> bool:
        refusal = self._refusal(item)
        if refusal is not None:
            self.ending.limit_reached = refusal
            self.log.log("limit_reached", self.now_ns(), reason=refusal)
            self.pool.drain()
        return refusal is None

    def _admit(self) -> None:
        """Hand out work while a worker is free for it and the limits allow it."""
        while self._may_start and (chosen := self._dispatch.next(self.now_ns())) is not None:
            if not self._is_within_limits(replace(chosen.item, estimate=chosen.offer.estimate)):
                return
            handed_out = self.queue.hand_out(chosen)
            assert handed_out is not None, "it waits"
            # The leader of a gang that lost another rank lives on for a moment, in which it may commit.
            if handed_out.attempt > 1 and self._settle_if_committed(handed_out):
                self.ending.wasted.pop((handed_out.request.id, handed_out.attempt), None)  # it never began
            else:
                self._submit(handed_out)

    def _submit(self, item: WorkItem, **facts: Any) -> None:
        now_ns = self.now_ns()
        self.pace.start(item, now_ns)
        if item.memory_rung != "planned":
            facts["memory_rung"] = item.memory_rung
        if item.offers:
            facts |= {"parallel": item.layout.name, "parallel_reason": item.layout_reason}
        self.log.log("attempt_started", now_ns, id=item.request.id, key=item.key, attempt=item.attempt, **facts)
        self.pool.submit(item, self.queue.upcoming(NUM_UPCOMING))

    def _want_workers(self) -> None:
        self._dispatch.want(self.now_ns(), may_start=self._may_start)

    @property
    def _may_start(self) -> bool:
        return self._stop_seen_ns is None and self.ending.limit_reached is None

    def _refusal(self, item: WorkItem) -> str | None:
        """Why `item` may not start. Estimates are scaled by what the clips so far took, cold starts and waste apart."""
        ratio = self._taken_usd / self._estimated_usd if self._estimated_usd > 0 else 1.0
        return self.admission.refusal(
            spent_usd=self.counts.spent_usd,
            in_flight_usd=self.queue.open_usd * ratio,
            next_usd=item.estimate.cost_usd * ratio,
            next_s=item.estimate.clip_s * ratio,
            now_ns=self.now_ns(),
        )

    def _race_stragglers(self) -> None:
        """With nothing left to hand out, idle workers try again what takes much longer than predicted."""
        now_ns = self.now_ns()
        if self.queue.num_waiting or not self._may_start or now_ns < self._stragglers_at_ns:
            return
        self._stragglers_at_ns = now_ns + round(STRAGGLERS_EVERY_S * NS_PER_S)
        for item in self.queue.in_flight:
            is_raced = bool(self.queue.rivals(item)) or not self.pace.is_late(item, now_ns)
            if not is_raced and self.pool.num_free(item.layout) and self._refusal(item) is None:
                self._submit(self.queue.speculate(item), beside=item.attempt)

    def _apply(self, event: PoolEvent | None) -> None:
        match event:
            case Finished(outcome):
                if not (isinstance(outcome, Failed) and is_nobodys(outcome.fault)):
                    self._crashes.item_ended()
                self._books.count_spent()
                self._settle(outcome)
                self._books.flush_soon()
            case WorkerBroken(error):
                self._lose_worker(error)
            case WorkerGone():
                self._take_back_from(event)
                self._books.flush_soon()
            case Noted(name, facts):
                self.log.log(name, self.now_ns(), **facts)
                self._books.flush_soon()
            case Freed():
                self._books.flush_soon()
            case None:
                pass

    def _settle(self, outcome: Outcome) -> None:
        if not self.queue.is_in_flight(outcome.item):
            # A rival was first; whatever this one did was for nothing.
            self._waste(outcome.item, DUPLICATE)
        elif isinstance(outcome, Rendered):
            self._settle_rendered(outcome if outcome.record is None else self.commit(outcome))
        else:
            self._settle_failed(outcome)

    def _settle_rendered(self, rendered: Rendered) -> None:
        item, row, winner = rendered.item, rendered_row(rendered, self.facts), None
        if rendered.adopted_from is None:
            winner = item.attempt
            self.pace.learn(item, (rendered.finished_ns - rendered.started_ns) / NS_PER_S)
            self._learn_cost(item)
        elif rendered.adopted_from == self.facts.run_id:
            # Another attempt of this run committed and was lost before it could say so: the clip is its work.
            row["attempts"] = winner = rendered.adopted_attempt
        self._settle_row(item, row, winner=winner)

    def _learn_cost(self, item: WorkItem) -> None:
        cost_usd, _ = self.ending.charges.by_attempt.get((item.request.id, item.attempt), (Decimal(0), 0))
        self._taken_usd += float(cost_usd)
        self._estimated_usd += item.estimate.cost_usd

    def _settle_row(self, item: WorkItem, row: dict[str, Any], *, winner: int | None) -> None:
        """`winner` is the attempt of this run that gave the clip; None if another driver's did."""
        rivals = self.queue.rivals(item)
        for attempt in (item, *rivals):
            if attempt.attempt != winner:
                self.ending.wasted[attempt.request.id, attempt.attempt] = DUPLICATE
        if winner is not None:
            self.ending.rendered_attempts[item.request.id] = winner
            self.ending.wasted.pop((item.request.id, winner), None)
        for rival in rivals:
            self.pool.cancel(rival)
        self.pace.forget(item)
        rows = [row, *(skipped_row(twin, row, self.facts) for twin in self.queue.settle(item))]
        # First all that a failing log must not take back.
        self.ending.rows += rows
        self.on_rendered(item.key)
        self.counts.num_rendered += 1
        self.counts.num_skipped += len(rows) - 1
        self.counts.num_to_render -= len(rows) - 1
        for each in rows:
            self.log.log(each["status"], self.now_ns(), id=each["id"], row=each)

    def _settle_failed(self, failed: Failed) -> None:
        item = failed.item
        self._waste(item, failed.fault)
        if self.queue.drop(item):
            self._log_failed(failed, "leave it to the other attempt")
            return
        decision = after_failure(failed.fault, item, self._failures)
        if decision is AfterFailure.SET_ASIDE:
            self._set_aside(failed)
        else:
            self.queue.take_back(retried(item, decision))
        if decision is AfterFailure.STOP_JOB:
            unusable = failed.fault == UsageError.__name__
            self.ending.stopped_by = (UsageError if unusable else PipelineError)(failed.error_message)
        self._log_failed(failed, decision.value)

    def _log_failed(self, failed: Failed, follows: str) -> None:
        self.log.log(
            "attempt_failed", self.now_ns(), id=failed.item.request.id, attempt=failed.item.attempt,
            error_class=failed.error_class, error_message=failed.error_message, next=follows,
        )  # fmt: skip

    def _waste(self, item: WorkItem, cause: str) -> None:
        self.pace.forget(item)
        self.ending.wasted[item.request.id, item.attempt] = cause

    def _take_back_from(self, gone: WorkerGone) -> None:
        """The items of a lost worker: rendered, if their commit stands; else the attempt has failed."""
        ids = [held.item.request.id for held in gone.held]
        self.log.log("worker_lost", self.now_ns(), cause=gone.cause, fault=gone.fault, ids=ids)
        lost = []
        for held in gone.held:
            if not self.queue.is_in_flight(held.item):
                self._waste(held.item, DUPLICATE)
            elif not self._settle_if_committed(held.item):
                lost.append(held.item)
                self._settle_lost(held, gone)
        if not is_nobodys(gone.fault):
            self._crashes.num_workers = max(self._crashes.num_workers, self._books.num_held_workers)
            reason = self._crashes.worker_lost(
                lost, gone.cause, num_busy=self.queue.num_open, num_forms=self.queue.num_forms
            )
            if reason is not None:
                self.ending.stopped_by = self.ending.stopped_by or WorkerLost(reason)

    def _settle_lost(self, held: Held, gone: WorkerGone) -> None:
        item, fault = held.item, gone.fault
        if not is_nobodys(fault) and not held.is_suspect:
            # Another item was there as well, and it is not known whose doing it was: each is tried alone next.
            self._waste(item, fault)
            if not self.queue.drop(item):
                self.queue.take_back(retried(item, AfterFailure.RETRY))
            return
        times = self._failures.num(item.request.id, fault) + 1
        verb = {WorkerLost.__name__: "killed", Hang.__name__: "hung"}.get(fault)
        message = gone.cause if verb is None else f"{verb} {times} worker{'s' if times > 1 else ''}: {gone.cause}"
        self._settle_failed(Failed(item, fault, message, fault, held.since_ns, max(held.since_ns, self.now_ns())))

    def _settle_if_committed(self, item: WorkItem) -> bool:
        record = self.committed(item)
        if record is None or record["run_id"] != self.facts.run_id:
            return False
        self._settle_row(item, recovered_row(item, record, self.facts), winner=record["attempt"])
        return True

    def _set_aside(self, failed: Failed) -> None:
        row = failed_row(failed, self.facts)
        self.queue.set_aside(failed.item)
        self.ending.rows.append(row)
        self.counts.num_failed += 1
        refusal = self.admission.too_many_failed(self.counts.num_failed)
        if refusal is not None:
            self.ending.stopped_by = PipelineError(f"{refusal}; the last: {failed.error_message}")
        self.log.log("failed", self.now_ns(), id=row["id"], row=row)

    def _lose_worker(self, error: BaseException) -> None:
        """No worker can be had, or none can be set up: the job ends, with the code that the error carries."""
        if isinstance(error, PipelineError):
            self.ending.stopped_by = error
            return
        bug = UnexpectedFailure(f"the worker could not be set up: {type(error).__name__}: {error}")
        bug.__cause__ = error
        self.ending.stopped_by = bug

    def _show(self) -> None:
        self.counts.num_running = self.queue.num_in_flight
        self.progress.show(self.counts)

    def _close(self, started: bool) -> None:
        """Release the workers and give every row that was not settled its own."""
        if started:
            self._settle_what_is_finished()
            # A rival that lost may still be at it: nobody waits for it.
            in_a_hurry = self.ending.stopped_by is not None or self.pace.has_open_attempts
            self.pool.stop(abandon=in_a_hurry)
            try:
                self._settle_what_is_finished()
                self._books.flush()
            except PipelineError as error:
                self.ending.stopped_by = self.ending.stopped_by or error
        for item in self.queue.in_flight:
            self._waste(item, GIVEN_UP)
        for item in self.queue.unfinished():
            row = item_row(item, self.facts, status="not_started")
            row["attempts"] = self.queue.num_attempts(item)
            self.ending.rows.append(row)
        self.counts.num_running = 0
        self.progress.show(self.counts, last=True)

    def _settle_what_is_finished(self) -> None:
        """A clip that was committed between the last look and the stop is rendered, not given up."""
        try:
            while (event := self.pool.next_event(0)) is not None:
                if isinstance(event, Finished) and isinstance(event.outcome, Rendered):
                    self._settle(event.outcome)
                elif isinstance(event, WorkerGone):
                    for held in event.held:
                        if self.queue.is_in_flight(held.item):
                            self._settle_if_committed(held.item)
        except PipelineError as error:
            self.ending.stopped_by = self.ending.stopped_by or error
