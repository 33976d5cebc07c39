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


# The device has nothing to do, so what the host does for a clip shows.
_VACANT = ("idle", "drain")
# A state, and the row and attempt it is for.
_State = tuple[str, str | None, int | None]


class Meter:
    """Accounts for the held time of the worker in `seat`, from `seat.acquired_ns` on.

    The device's state counts; what the host does meanwhile for another clip shows only while the device is vacant.
    """

    def __init__(self, seat: WorkerSeat, price: UnitPrice, now_ns: Callable[[], int]) -> None:
        self.seat = seat
        self._price = price
        self.now_ns = now_ns
        self._lock = threading.Lock()
        self._closed: list[LedgerEntry] = []
        self._by_attempt: dict[tuple[str, int | None], list[LedgerEntry]] = {}
        self._device: _State = ("provisioning", None, None)
        self._host: _State | None = None
        self._open: tuple[_State, int] | None = (self._device, seat.acquired_ns)
        self._is_draining = False
        self._released_ns: int | None = None

    def enter(self, state: str, *, id: str | None = None, attempt: int | None = None) -> None:
        """From now on the device is in `state`, for row `id` if it works for one. No effect once released."""
        _require_known(state)
        with self._lock:
            self._device = ("drain" if state == "idle" and self._is_draining else state, id, attempt)
            self._switch()

    def enter_host(self, state: str, *, id: str, attempt: int) -> None:
        """From now on the host does `state` for row `id`, whatever the device does."""
        _require_known(state)
        with self._lock:
            self._host = (state, id, attempt)
            self._switch()

    def leave_host(self) -> None:
        with self._lock:
            self._host = None
            self._switch()

    def drain(self) -> None:
        """No work will come any more: what would be `idle` is `drain` from now on."""
        with self._lock:
            self._is_draining = True
            if self._device[0] == "idle":
                self._device = ("drain", None, None)
                self._switch()

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

    def entries_of(self, id: str, attempt: int) -> tuple[LedgerEntry, ...]:
        """All entries of an attempt so far, a running one as if it ended now."""
        with self._lock:
            entries = list(self._by_attempt.get((id, attempt), ()))
            if self._open is not None and self._open[0][1:] == (id, attempt):
                entries.append(self._entry(self.now_ns()))
            return tuple(entries)

    def forget(self, id: str, attempt: int) -> None:
        """The attempt is over: `entries_of` will not be asked for it any more."""
        with self._lock:
            self._by_attempt.pop((id, attempt), None)

    def _switch(self) -> None:
        state = self._host if self._host is not None and self._device[0] in _VACANT else self._device
        if self._open is not None and self._open[0] != state:
            self._open = (state, self._close_open())

    def _close_open(self) -> int:
        now_ns = self.now_ns()
        entry = self._entry(now_ns)
        self._closed.append(entry)
        if entry.id is not None:
            self._by_attempt.setdefault((entry.id, entry.attempt), []).append(entry)
        return now_ns

    def _entry(self, t1_ns: int) -> LedgerEntry:
        assert self._open is not None
        (state, row_id, attempt), t0_ns = self._open
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


def _require_known(state: str) -> None:
    if state not in LEDGER_STATES:
        raise ValueError(f"state must be one of {', '.join(LEDGER_STATES)}, got {state!r}")
