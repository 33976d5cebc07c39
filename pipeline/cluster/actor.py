"""One Ray actor: a process that holds one worker, and answers while the worker loads and renders.

The worker runs on the thread of a `LocalPool`; the actor's own methods only read and pass on. What crosses the border
are records (items, outcomes, ledger entries), never frames.
"""

from __future__ import annotations

import os
import pickle
import platform
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.cluster.local_pool import LocalPool
from pipeline.cluster.pool import PoolEvent, Worker, WorkerBroken, WorkerFactory
from pipeline.cost.meter import Meter, utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.errors import PipelineError
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.work import WorkItem
from pipeline.telemetry import log_to_stderr

# `poll` waits while another call hands in an item, and `stop` must never wait behind either.
CONCURRENCY = 4


@dataclass(frozen=True)
class Hello:
    """Who the process is. `born_ns` is when it could first run our code, by its own clock."""

    pid: int
    ray_node_id: str
    node_name: str
    born_ns: int


@dataclass(frozen=True)
class Report:
    """What happened since the last report. `running` is as if it ended now; `released_ns` only in the last one."""

    events: tuple[PoolEvent, ...]
    closed: tuple[LedgerEntry, ...]
    running: LedgerEntry | None
    is_ready: bool
    released_ns: int | None = None


class WorkerProcess:
    """The inside of the actor; `worker_actor` makes it one."""

    def __init__(self, folder: str) -> None:
        self._clock = utc_clock()
        self._born_ns = self._clock()
        self._pool: LocalPool | None = None
        self._is_ready = False
        # Relative paths of the configuration mean the driver's folder. Elsewhere it may not be there: the worker's
        # set-up then names the file that it misses.
        with suppress(OSError):
            os.chdir(folder)

    def hello(self) -> Hello:
        return Hello(os.getpid(), ray.get_runtime_context().get_node_id(), platform.node(), self._born_ns)

    def now_ns(self) -> int:
        return self._clock()

    def begin(self, factory: WorkerFactory, seat: WorkerSeat, price: UnitPrice, offset_ns: int, log_level: str) -> None:
        """Build the worker. Its meter runs on this process's clock plus `offset_ns`, which makes it the driver's."""
        log_to_stderr(level=log_level)

        def build(meter: Meter) -> Worker:
            worker = factory(meter)
            self._is_ready = True
            return worker

        self._pool = LocalPool(build, lambda: Meter(seat, price, lambda: self._clock() + offset_ns))
        self._pool.start()

    def submit(self, item: WorkItem) -> None:
        assert self._pool is not None
        self._pool.submit(item)

    def poll(self, timeout_s: float) -> Report:
        """Wait for an event for at most `timeout_s`, then say everything that is new."""
        return self._report(timeout_s)

    def stop(self, abandon: bool) -> Report:
        """Release the worker; the last report. The process itself is ended by whoever made it."""
        assert self._pool is not None
        self._pool.stop(abandon=abandon)
        return self._report(0.0)

    def _report(self, timeout_s: float) -> Report:
        assert self._pool is not None
        events: list[PoolEvent] = []
        while (event := self._pool.next_event(0.0 if events else timeout_s)) is not None:
            events.append(_portable(event))
        is_ready = self._is_ready
        closed, running = self._pool.take_ledger()
        (seat,) = self._pool.seats()
        return Report(tuple(events), tuple(closed), running[0] if running else None, is_ready, seat.released_ns)


def worker_actor(*, num_cpus: float, num_gpus: float, threads: int, folder: str) -> Any:
    """Ask the cluster for one worker process. Ray sets OMP_NUM_THREADS=1 for actors, and bytes must not depend on
    that: `threads` is what the configuration says."""
    actor = ray.remote(WorkerProcess).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=0,
        max_concurrency=CONCURRENCY,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    return actor.remote(folder)


def _portable(event: PoolEvent) -> PoolEvent:
    """The event with an error that survives the way to the driver: its class, its text, and its traceback as text."""
    if not isinstance(event, WorkerBroken):
        return event
    error = event.error
    if not isinstance(error, PipelineError):
        error.add_note("in the worker:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - a library's exception may refuse in any way
        substitute = RuntimeError(f"{type(error).__name__}: {error}")
        substitute.add_note("in the worker:\n" + "".join(traceback.format_exception(error)))
        return WorkerBroken(substitute)
    return WorkerBroken(error)
