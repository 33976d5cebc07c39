"""What the driver needs of workers, wherever they run: a Pool, and the events it reports.

A pool is handed a factory for workers and calls it where a worker shall live; it never imports the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.cost.meter import Meter
from pipeline.records.outcome import LedgerEntry, Outcome, WorkerSeat
from pipeline.records.work import WorkItem


class Worker(Protocol):
    """Renders one item at a time; whatever goes wrong with an item comes back as its outcome."""

    def execute(self, item: WorkItem) -> Outcome: ...


# Builds the worker whose time `Meter` accounts for. Runs in the worker's own process or thread: it loads the model.
WorkerFactory = Callable[[Meter], Worker]


@dataclass(frozen=True)
class Finished:
    """A worker ended an item and is free again."""

    outcome: Outcome


@dataclass(frozen=True)
class WorkerBroken:
    """A worker could not be set up, or there is none left: the job cannot go on."""

    error: BaseException


@dataclass(frozen=True)
class WorkerGone:
    """A worker ended without an answer, and the pool goes on without it. `item` is what it held since `since_ns`."""

    cause: str
    item: WorkItem | None
    since_ns: int


PoolEvent = Finished | WorkerBroken | WorkerGone


class Pool(Protocol):
    """Workers as the driver sees them. All methods are called from the driver's thread and return at once, but for
    `next_event`, which waits at most `timeout_s`, and `stop`."""

    def start(self) -> None: ...

    def num_free(self) -> int: ...

    def submit(self, item: WorkItem) -> None: ...

    def next_event(self, timeout_s: float) -> PoolEvent | None: ...

    def seats(self) -> list[WorkerSeat]: ...

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        """Ledger entries closed since the last call, and the running ones as if they ended now."""
        ...

    def stop(self, *, abandon: bool) -> None:
        """Release the workers. With `abandon` what they are doing is given up at once."""
        ...
