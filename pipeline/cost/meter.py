"""The meter of one worker: turns held time into ledger entries without gap or overlap.

Each change of state closes one entry and opens the next at the same nanosecond, so the entries partition the time
from `acquired_ns` to `released_ns` by construction. Thread-safe: the worker changes states while the driver reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipeline.cost.pricing import UnitPrice
from pipeline.records.outcome import LEDGER_STATES, LedgerEntry, WorkerSeat, ledger_entry


def utc_clock() -> Callable[[], int]:
    """UTC nanoseconds that never jump: the wall clock once, the monotonic clock from then on."""
    wall_ns, start_ns = time.time_ns(), time.monotonic_ns()
    return lambda: wall_ns + time.monotonic_ns() - start_ns


class Meter:
    """Accounts for the held time of the worker in `seat`, from `seat.acquired_ns` on."""

    def __init__(self, seat: WorkerSeat, price: UnitPrice, now_ns: Callable[[], int]) -> None:
        self.seat = seat
        self._price = price
        self.now_ns = now_ns
        self._lock = threading.Lock()
        self._closed: list[LedgerEntry] = []
        self._attempt_entries: list[LedgerEntry] = []
        self._open: tuple[str, str | None, int | None, int] | None = ("provisioning", None, None, seat.acquired_ns)
        self._released_ns: int | None = None

    def enter(self, state: str, *, id: str | None = None, attempt: int | None = None) -> None:
        """From now on the worker is in `state`, for row `id` if it works for one. No effect once released."""
        if state not in LEDGER_STATES:
            raise ValueError(f"state must be one of {', '.join(LEDGER_STATES)}, got {state!r}")
        with self._lock:
            if self._open is None or self._open[:3] == (state, id, attempt):
                return
            now_ns = self._close_open()
            if id is not None and self._attempt_of(self._attempt_entries) != (id, attempt):
                self._attempt_entries = []
            self._open = (state, id, attempt, now_ns)

    def release(self) -> int:
        """Close the last entry; returns `released_ns`. A second call returns the same."""
        with self._lock:
            if self._released_ns is None:
                self._released_ns = self._close_open()
                self._open = None
            return self._released_ns

    def take_closed(self) -> list[LedgerEntry]:
        """The entries closed since the last call, oldest first."""
        with self._lock:
            taken, self._closed = self._closed, []
            return taken

    def open_entry(self) -> LedgerEntry | None:
        """The running entry as if it ended now, or None once released."""
        with self._lock:
            return None if self._open is None else self._entry(self.now_ns())

    def attempt_entries(self) -> tuple[LedgerEntry, ...]:
        """All entries of the attempt last entered so far, the running one as if it ended now."""
        with self._lock:
            entries = list(self._attempt_entries)
            if self._open is not None and self._open[1] is not None:
                entries.append(self._entry(self.now_ns()))
            return tuple(entries)

    @staticmethod
    def _attempt_of(entries: list[LedgerEntry]) -> tuple[str | None, int | None] | None:
        return (entries[-1].id, entries[-1].attempt) if entries else None

    def _close_open(self) -> int:
        now_ns = self.now_ns()
        entry = self._entry(now_ns)
        self._closed.append(entry)
        if entry.id is not None:
            self._attempt_entries.append(entry)
        return now_ns

    def _entry(self, t1_ns: int) -> LedgerEntry:
        assert self._open is not None
        state, row_id, attempt, t0_ns = self._open
        cost_usd = self._price.cost(t1_ns - t0_ns)
        return ledger_entry(
            self.seat,
            state,
            t0_ns,
            t1_ns,
            price_id=self._price.price_id,
            cost_usd=cost_usd,
            id=row_id,
            attempt=attempt,
        )
