"""The Pool in this process: one worker on a thread of its own.

The driver keeps the main thread, so that signals and the ledger are served while the worker loads and renders.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from pipeline.cluster.pool import Finished, PoolEvent, Worker, WorkerBroken, WorkerFactory
from pipeline.cost.meter import Meter
from pipeline.errors import WorkerLost
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.work import WorkItem
from pipeline.telemetry import log_about

# A finished worker frees its memory within moments; the thread is a daemon, so a longer wait would gain nothing.
JOIN_S = 10.0


class LocalPool:
    """A pool of one worker. `acquire` makes the meter of the worker's seat at the moment the worker starts."""

    def __init__(self, factory: WorkerFactory, acquire: Callable[[], Meter]) -> None:
        self._factory = factory
        self._acquire = acquire
        self._meter: Meter | None = None
        self._released_ns: int | None = None
        self._busy = False
        self._inbox: queue.SimpleQueue[WorkItem | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[PoolEvent] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._meter = self._acquire()
        self._thread.start()

    def num_free(self) -> int:
        return 0 if self._busy else 1

    def submit(self, item: WorkItem) -> None:
        self._busy = True
        self._inbox.put(item)

    def next_event(self, timeout_s: float) -> PoolEvent | None:
        try:
            event = self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        self._busy = False
        return event

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
        self._meter.enter("teardown")
        self._inbox.put(None)
        if not abandon:
            self._thread.join(JOIN_S)
        self._released_ns = self._meter.release()

    def _work(self) -> None:
        assert self._meter is not None
        try:
            with log_about(worker=self._meter.seat.gpu_id):
                worker: Worker = self._factory(self._meter)
                self._meter.enter("idle")
                while (item := self._inbox.get()) is not None:
                    with log_about(id=item.request.id, attempt=item.attempt):
                        outcome = worker.execute(item)
                    self._events.put(Finished(outcome))
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver must hear of it
            self._events.put(WorkerBroken(error))
        except SystemExit as error:
            self._events.put(WorkerBroken(WorkerLost(f"the worker exited: {error}")))
