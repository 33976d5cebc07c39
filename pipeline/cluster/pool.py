"""What the driver needs of workers, wherever they run: a Pool, and the events it reports.

A worker holds one model, in a layout; it is one process or a gang of them, one a GPU. A pool is handed a factory for workers and
calls it where a worker shall live; it never imports the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.cluster.assignment import Assignment
from pipeline.cost.meter import Meter
from pipeline.errors import WorkerLost
from pipeline.planning.timetable import Fleet
from pipeline.records.gang import Member
from pipeline.records.outcome import LedgerEntry, Outcome, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem


class Worker(Protocol):
    """Renders items; whatever goes wrong with one comes back as its outcome, what goes wrong with the worker raises.

    In a gang every rank executes. The leader's outcome counts; a follower ends with None, or with the failure it met.
    """

    def execute(self, assignment: Assignment) -> None:
        """Work on an item until the device is free for the next; `assignment.end` is called then or later, once."""
        ...


# Builds the worker whose time `Meter` accounts for. Runs in the worker's own process or thread: it loads the model.
WorkerFactory = Callable[[Meter, Member], Worker]


@dataclass(frozen=True)
class Finished:
    """An item was ended by its worker."""

    outcome: Outcome


@dataclass(frozen=True)
class Freed:
    """A worker can take an item: it became ready, or its device is done with the last one."""


@dataclass(frozen=True)
class WorkerBroken:
    """The job cannot go on: no worker can be set up, or none finds a place that can be used."""

    error: BaseException


@dataclass(frozen=True)
class Held:
    """An item in the hands of a worker since `since_ns` (UTC). With `is_suspect` it was there alone, so it may have
    caused what happened to the worker; of several nobody knows which did."""

    item: WorkItem
    since_ns: int
    is_suspect: bool = True


@dataclass(frozen=True)
class WorkerGone:
    """A worker ended without an answer and the pool goes on without it. `fault` is a name of `errors.FAULTS`."""

    cause: str
    held: tuple[Held, ...] = ()
    fault: str = WorkerLost.__name__


@dataclass(frozen=True)
class Noted:
    """Something for the event log that asks for no decision."""

    event: str
    facts: Mapping[str, Any] = field(default_factory=dict)


PoolEvent = Finished | Freed | WorkerBroken | WorkerGone | Noted


class Pool(Protocol):
    """Workers as the driver sees them. All methods are called from the driver's thread and return at once, but for
    `next_event`, which waits at most `timeout_s`, and `stop`."""

    def start(self) -> None: ...

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None:
        """How many workers of each layout the queue can use from now on. Missing ones are started where there is room;
        where they lack GPUs, idle ones that are in nobody's wish are given back for them at once. Of others beyond the
        wish, `num_spare` are kept, and those that have been idle for long are given back."""
        ...

    def fleet(self) -> Fleet:
        """The GPUs there are, and the workers on them; no GPUs while that is not known."""
        ...

    def num_free(self, layout: ParallelLayout) -> int:
        """How many items of `layout` can be submitted now."""
        ...

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        """Give `item` to a free worker of its layout. `upcoming` may come next, to this worker or another: a hint to
        prefetch."""
        ...

    def cancel(self, item: WorkItem) -> None:
        """Ask the worker that has `item` to give it up at its next step; it then ends with the fault `Cancelled`."""
        ...

    def drain(self) -> None:
        """No item will be submitted any more: workers without work are in the state `drain` from now on."""
        ...

    def next_event(self, timeout_s: float) -> PoolEvent | None: ...

    def seats(self) -> list[WorkerSeat]: ...

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        """Ledger entries closed since the last call, and the running ones as if they ended now."""
        ...

    def stop(self, *, abandon: bool) -> None:
        """Release the workers. With `abandon` what they are doing is given up at once."""
        ...
