"""One Ray actor: a process that is one rank of a worker, and answers while the worker loads and renders.

The worker runs on the thread of a `LocalPool`; the actor's own methods only read and pass on. What crosses the border
are records (items, outcomes, ledger entries), never frames.
"""

from __future__ import annotations

import os
import pickle
import platform
import socket
import traceback
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from pipeline.cluster.gpu_memory import memory_in_use
from pipeline.cluster.local_pool import LocalPool
from pipeline.cluster.node_agent import Process
from pipeline.cluster.pool import Finished, Worker, WorkerBroken, WorkerFactory
from pipeline.cluster.rank_report import Hello, Report, Sign
from pipeline.cost.meter import Meter, utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.errors import PipelineError
from pipeline.records.gang import Member
from pipeline.records.outcome import Outcome, WorkerSeat
from pipeline.records.work import WorkItem
from pipeline.storage.processes import start_ticks
from pipeline.telemetry import log_to_stderr

# `poll` waits while another call hands in an item, and neither `cancel` nor `stop` must wait behind them.
CONCURRENCY = 5
# The ranks of a gang share a node, and whoever can reach their meeting point could join or disturb them.
LOOPBACK = "127.0.0.1"


class WorkerProcess:
    """The inside of the actor; `rank_actor` makes it one."""

    def __init__(self, folder: str) -> None:
        self._clock = utc_clock()
        self._born_ns = self._clock()
        self._pool: LocalPool | None = None
        self._meeting_point: socket.socket | None = None
        self._is_ready = False
        self._num_taken = 0
        # Relative paths of the configuration mean the driver's folder. Elsewhere it may not be there: the worker's
        # set-up then names the file that it misses.
        with suppress(OSError):
            os.chdir(folder)

    def hello(self, leads: bool) -> Hello:
        """With `leads` the process listens where the ranks of its gang will meet, on a port that the system picks."""
        if leads:
            self._meeting_point = socket.create_server((LOOPBACK, 0), backlog=64)
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
        return Hello(
            process=Process(os.getpid(), start_ticks(os.getpid())),
            ray_node_id=context.get_node_id(),
            node_name=platform.node(),
            born_ns=self._born_ns,
            port=self._meeting_point.getsockname()[1] if self._meeting_point is not None else 0,
            gpus=memory_in_use(gpus) if gpus else (),
        )

    def now_ns(self) -> int:
        return self._clock()

    def begin(
        self, factory: WorkerFactory, member: Member, seat: WorkerSeat, price: UnitPrice, offset_ns: int, log_level: str
    ) -> None:
        """Build the worker. Its meter runs on this process's clock plus `offset_ns`, which makes it the driver's."""
        log_to_stderr(level=log_level)
        if self._meeting_point is not None:
            member = replace(member, listen_fd=self._meeting_point.detach())

        def build(meter: Meter, member: Member) -> Worker:
            worker = factory(meter, member)
            self._is_ready = True
            return worker

        acquire = lambda: Meter(seat, price, lambda: self._clock() + offset_ns)  # noqa: E731
        self._pool = LocalPool(build, acquire, member=member)
        self._pool.start()

    def submit(self, item: WorkItem, upcoming: tuple[WorkItem, ...]) -> None:
        assert self._pool is not None
        self._pool.submit(item, upcoming)
        self._num_taken += 1

    def cancel(self, item: WorkItem) -> None:
        assert self._pool is not None
        self._pool.cancel(item)

    def drain(self) -> None:
        assert self._pool is not None
        self._pool.drain()

    def poll(self, timeout_s: float) -> Report:
        """Wait for an event for at most `timeout_s`, then say everything that is new."""
        return self._report(timeout_s)

    def stop(self, abandon: bool) -> Report:
        """Release the worker; the last report. The process itself is ended by whoever made it."""
        assert self._pool is not None
        self._pool.stop(abandon=abandon)
        return self._report(0.0)

    def _report(self, timeout_s: float) -> Report:
        pool = self._pool
        assert pool is not None
        event = pool.next_event(timeout_s)
        # Before the other events: an item's outcome is told no later than that its worker is free.
        num_taken = self._num_taken
        is_free, is_ready = pool.is_free, self._is_ready
        outcomes: list[Outcome] = []
        error: BaseException | None = None
        while event is not None:
            if isinstance(event, Finished):
                outcomes.append(event.outcome)
            elif isinstance(event, WorkerBroken):
                error = _portable(event.error)
            event = pool.next_event(0.0)
        closed, running = pool.take_ledger()
        (seat,) = pool.seats()
        return Report(
            outcomes=tuple(outcomes),
            error=error,
            closed=tuple(closed),
            running=running[0] if running else None,
            is_ready=is_ready,
            num_taken=num_taken,
            is_free=is_free,
            signs=tuple(Sign(a.item.key, a.item.attempt, a.last_beat, a.silent_s) for a in pool.held()),
            released_ns=seat.released_ns,
        )


def rank_actor(*, num_cpus: float, num_gpus: float, threads: int, folder: str, place: Any) -> Any:
    """Ask the cluster for one process at `place`. Ray sets OMP_NUM_THREADS=1 for actors, and bytes must not depend on
    that: `threads` is what the configuration says."""
    actor = ray.remote(WorkerProcess).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=0,
        max_concurrency=CONCURRENCY,
        scheduling_strategy=place,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    return actor.remote(folder)


def _portable(error: BaseException) -> BaseException:
    """An error that survives the way to the driver: its class, its text, and its traceback as text."""
    if not isinstance(error, PipelineError):
        error.add_note("in the worker:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - a library's exception may refuse in any way
        substitute = RuntimeError(f"{type(error).__name__}: {error}")
        substitute.add_note("in the worker:\n" + "".join(traceback.format_exception(error)))
        return substitute
    return error
