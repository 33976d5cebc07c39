"""The ledger of one rank as the driver keeps it: what the rank reported, and what it can report no more.

Pure: the caller supplies the time, in UTC nanoseconds of the run's clock.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.cost.pricing import UnitPrice
from pipeline.records.outcome import LedgerEntry, WorkerSeat, ledger_entry


class RankLedger:
    """Its entries partition the seat's time, however the rank ends."""

    def __init__(self, seat: WorkerSeat, price: UnitPrice) -> None:
        self.seat = seat
        self._price = price
        self._closed: list[LedgerEntry] = []
        self._running: LedgerEntry | None = None
        self._closed_to_ns = seat.acquired_ns
        # Entries that came before those of an earlier report, by their begin: what lies between may never come.
        self._ahead: dict[int, int] = {}
        self._lost_ns: int | None = None
        self._is_over = False

    def take(self, closed: tuple[LedgerEntry, ...], running: LedgerEntry | None, released_ns: int | None) -> None:
        """What the rank says; without effect once it is lost, or released here too. `released_ns` comes with its last
        report."""
        if self._lost_ns is not None or self._is_over:
            return
        self._closed.extend(closed)
        self._ahead |= {entry.t0_ns: entry.t1_ns for entry in closed}
        while self._closed_to_ns in self._ahead:
            self._closed_to_ns = self._ahead.pop(self._closed_to_ns)
        # An answer to an earlier question may come after the last report.
        self._running = running if self.seat.released_ns is None else None
        if released_ns is not None:
            self.seat = replace(self.seat, released_ns=released_ns)

    def lose(self, now_ns: int) -> None:
        """It can report no more: what it last said holds, then it is `unknown`, and from now on it is torn down."""
        if self._lost_ns is not None or self.seat.released_ns is not None:
            return
        if self._running is not None:
            self._closed.append(self._running)
            self._ahead[self._running.t0_ns] = self._running.t1_ns
            self._running = None
        self._lost_ns = max([self._closed_to_ns, now_ns, *self._ahead.values()])
        self._fill_up_to(self._lost_ns)

    def release(self, now_ns: int) -> None:
        """Its place is free again. Of a rank that said its last, reports that did not come leave `unknown` time."""
        if self._is_over:
            return
        self._is_over = True
        if self.seat.released_ns is not None:
            self._fill_up_to(self.seat.released_ns)
            return
        self.lose(now_ns)
        assert self._lost_ns is not None, "lost just now, if not before"
        released_ns = max(self._lost_ns, now_ns)
        self._book("teardown", self._lost_ns, released_ns)
        self.seat = replace(self.seat, released_ns=released_ns)

    def take_closed(self) -> list[LedgerEntry]:
        """The entries closed since the last call."""
        taken, self._closed = self._closed, []
        return taken

    def running(self, now_ns: int) -> LedgerEntry | None:
        """The running entry as it was last heard of; of a rank that is torn down, up to now."""
        if self._lost_ns is None or self.seat.released_ns is not None:
            return self._running
        return self._entry("teardown", self._lost_ns, now_ns) if now_ns > self._lost_ns else None

    def _fill_up_to(self, end_ns: int) -> None:
        """Book as `unknown` what no entry covers up to `end_ns`."""
        for t0_ns, t1_ns in (*sorted(self._ahead.items()), (end_ns, end_ns)):
            self._book("unknown", self._closed_to_ns, t0_ns)
            self._closed_to_ns = max(self._closed_to_ns, t1_ns)
        self._ahead.clear()

    def _book(self, state: str, t0_ns: int, t1_ns: int) -> None:
        if t1_ns > t0_ns:
            self._closed.append(self._entry(state, t0_ns, t1_ns))

    def _entry(self, state: str, t0_ns: int, t1_ns: int) -> LedgerEntry:
        price = self._price
        cost_usd = price.cost(t1_ns - t0_ns)
        return ledger_entry(self.seat, state, t0_ns, t1_ns, price_id=price.price_id, cost_usd=cost_usd)
