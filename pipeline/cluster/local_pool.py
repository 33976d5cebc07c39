"""The Pool in this process: one worker on a thread of its own.

The driver keeps the main thread, so that signals and the ledger are served while the worker loads and renders.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.cluster.assignment import Assignment
from pipeline.cluster.pool import Finished, Freed, PoolEvent, Worker, WorkerBroken, WorkerFactory
from pipeline.cost.meter import Meter
from pipeline.errors import Hang, WorkerLost
from pipeline.planning.policy import silence_limit_s
from pipeline.planning.timetable import Fleet
from pipeline.records.gang import ALONE, Member
from pipeline.records.outcome import LedgerEntry, Outcome, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem
from pipeline.telemetry import log_about

# A finished worker frees its memory within moments; the thread is a daemon, so a longer wait would gain nothing.
JOIN_S = 10.0


class LocalPool:
    """A pool of one worker. `acquire` makes the meter of the worker's seat at the moment the worker starts.

    With `hang_after_s` a worker that is silent for longer ends the job: nothing can end a thread.
    """

    def __init__(
        self,
        factory: WorkerFactory,
        acquire: Callable[[], Meter],
        *,
        member: Member = ALONE,
        hang_after_s: float | None = None,
    ) -> None:
        self._factory = factory
        self._acquire = acquire
        self._member = member
        self._hang_after_s = hang_after_s
        self._meter: Meter | None = None
        self._released_ns: int | None = None
        self._is_free = True
        self._inbox: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[PoolEvent] = queue.SimpleQueue()
        # Not ended yet: the one the device works for, and those whose files are being finished.
        self._open: list[Assignment] = []
        self._change = threading.Condition()
        self._has_hung = False
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._meter = self._acquire()
        self._thread.start()

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None:
        """The one worker lives as long as its pool."""

    def fleet(self) -> Fleet:
        layout = self._member.layout
        return Fleet(layout.num_gpus, layout.num_gpus, held={layout: 1})

    @property
    def is_free(self) -> bool:
        """If the worker can take an item."""
        return self._is_free

    def num_free(self, layout: ParallelLayout) -> int:
        return 1 if self._is_free and layout == self._member.layout else 0

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        assignment = Assignment(item, lambda outcome: self._end(assignment, outcome), tuple(upcoming))
        with self._change:
            self._open.append(assignment)
        self._is_free = False
        self._inbox.put(assignment)

    def cancel(self, item: WorkItem) -> None:
        for assignment in self.held():
            if assignment.item.is_attempt(item.key, item.attempt):
                assignment.cancel()

    def drain(self) -> None:
        if self._meter is not None:
            self._meter.drain()

    def held(self) -> list[Assignment]:
        """What is in the worker's hands, oldest first."""
        with self._change:
            return list(self._open)

    def next_event(self, timeout_s: float) -> PoolEvent | None:
        try:
            return self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return self._silence()

    def seats(self) -> list[WorkerSeat]:
        if self._meter is None:
            return []
        return [replace(self._meter.seat, released_ns=self._released_ns)]

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        if self._meter is None:
            return [], []
        # The running entry first: if it closes in between it shows up in both, and the closed one is the later truth.
        running = self._meter.open_entry()
        closed = self._meter.take_closed()
        still_running = running is not None and not any(entry.t0_ns == running.t0_ns for entry in closed)
        return closed, [running] if running is not None and still_running else []

    def stop(self, *, abandon: bool) -> None:
        if self._meter is None:
            return
        self._inbox.put(None)
        # Whoever waits for an event need wait no longer.
        self._events.put(Freed())
        if not abandon:
            deadline_s = time.monotonic() + JOIN_S
            self._thread.join(JOIN_S)
            with self._change:
                self._change.wait_for(lambda: not self._open, max(0.0, deadline_s - time.monotonic()))
        self._meter.enter("teardown")
        self._released_ns = self._meter.release()

    def _end(self, ended: Assignment, outcome: Outcome | None) -> None:
        with self._change:
            self._open = [assignment for assignment in self._open if assignment is not ended]
            self._change.notify_all()
        if outcome is not None:
            self._events.put(Finished(outcome))

    def _work(self) -> None:
        assert self._meter is not None
        try:
            with log_about(worker=self._meter.seat.gpu_id):
                worker: Worker = self._factory(self._meter, self._member)
                self._meter.enter("idle")
                self._events.put(Freed())
                while (assignment := self._inbox.get()) is not None:
                    item = assignment.item
                    with log_about(id=item.request.id, attempt=item.attempt):
                        self._execute(worker, assignment)
                    self._is_free = True
                    self._events.put(Freed())
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver must hear of it
            self._events.put(WorkerBroken(error))
        except SystemExit as error:
            self._events.put(WorkerBroken(WorkerLost(f"the worker exited: {error}")))

    def _execute(self, worker: Worker, assignment: Assignment) -> None:
        """One item; one that is to be alone starts when all others have ended, and ends before the next starts."""
        if assignment.item.alone:
            with self._change:
                self._change.wait_for(lambda: self._open == [assignment])
        assignment.start()
        worker.execute(assignment)
        if assignment.item.alone:
            with self._change:
                self._change.wait_for(lambda: assignment not in self._open)

    def _silence(self) -> PoolEvent | None:
        """A hang, told once: of the item in work, or of one whose file is being finished."""
        if self._hang_after_s is None or self._has_hung:
            return None
        for assignment in self.held():
            item, beat = assignment.item, assignment.last_beat
            limit_s = silence_limit_s(item.estimate.longest_step_s, self._hang_after_s)
            if assignment.silent_s > limit_s:
                self._has_hung = True
                return WorkerBroken(
                    Hang(
                        f'row "{item.request.id}" gave no sign of life for {limit_s:.0f} s after step {beat.step} of '
                        f"{beat.stage or 'its start'}; run the same command again, with cluster=local to survive such "
                        "rows"
                    )
                )
        return None
