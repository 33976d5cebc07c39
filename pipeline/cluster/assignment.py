"""An item in the hands of a worker: how the worker says that it goes on, how it is asked to stop, and how it ends.

Thread-safe: the worker's threads tell, the pool's thread reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pipeline.errors import Cancelled
from pipeline.records.outcome import Outcome
from pipeline.records.work import WorkItem


@dataclass(frozen=True, slots=True)
class Beat:
    """The last sign of life of an attempt: the `count`-th, at `step` of `num_steps` of `stage` (0 of 0: no steps)."""

    count: int = 0
    stage: str = ""
    step: int = 0
    num_steps: int = 0


class Assignment:
    """One attempt at `item`. `upcoming` are items that may come next, for whatever can be fetched ahead."""

    def __init__(
        self, item: WorkItem, on_end: Callable[[Outcome | None], None], upcoming: tuple[WorkItem, ...] = ()
    ) -> None:
        self.item = item
        self.upcoming = upcoming
        self._on_end = on_end
        self._lock = threading.Lock()
        self._beat = Beat()
        self._heard_s: float | None = None
        self._is_cancelled = False
        self._has_ended = False

    def start(self) -> None:
        """The worker begins with it: silence counts from here."""
        with self._lock:
            self._heard_s = time.monotonic()

    def beat(self, stage: str, step: int = 0, num_steps: int = 0) -> None:
        """Say that the work goes on. Raises Cancelled if it shall not.

        Each rank of a gang hears of that at a step of its own; if one then waits for another in vain, the gang is
        ended. A worker that exchanges what its ranks heard before any of them raises saves its gang the new start.
        """
        with self._lock:
            self._heard_s = time.monotonic()
            self._beat = Beat(self._beat.count + 1, stage, step, num_steps)
            if self._is_cancelled:
                raise Cancelled(f"given up at step {step} of {stage}, as the driver asked")

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True

    def end(self, outcome: Outcome | None) -> None:
        """Give the answer. A second one is a bug of the worker and has no effect.

        None is for the ranks of a gang that follow: their part is done, and the leader says what became of the item.
        """
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
        self._on_end(outcome)

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life; 0 for what waits for its start."""
        with self._lock:
            return 0.0 if self._heard_s is None else time.monotonic() - self._heard_s

    @property
    def last_beat(self) -> Beat:
        with self._lock:
            return self._beat


@contextmanager
def signs_of_life(assignment: Assignment, stage: str, every_s: float) -> Iterator[None]:
    """Within, beats come from a thread of their own: for work that bounds its own silence but tells nobody of it."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(every_s):
            with suppress(Cancelled):  # heard where the work next beats itself
                assignment.beat(stage)

    threading.Thread(target=beat, name="signs-of-life", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
