"""The books of a running run: who is held, where the time goes, what is spent; written down in time.

What is written survives any kill of the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Protocol

from pipeline.cluster.ending import Ending
from pipeline.cluster.pool import Pool
from pipeline.cluster.progress import Counts
from pipeline.records.outcome import NS_PER_S, LedgerEntry, WorkerSeat

# What happened is written so soon; what comes together is written together, and where many workers make the books
# large, writing them takes no more than this share of the driver's time.
FLUSH_SOON_S = 0.2
FLUSH_SHARE = 0.05


class RunLog(Protocol):
    """What a driver writes while it runs (`storage.runs.RunFolder`)."""

    def log(self, event: str, now_ns: int, **facts: Any) -> None: ...

    def set_workers(self, seats: list[WorkerSeat]) -> None: ...

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None: ...


class Books:
    """Takes the ledger of `pool`, sums it into `ending` and `counts`, and writes it to `log` every `flush_every_s`."""

    def __init__(
        self, pool: Pool, log: RunLog, ending: Ending, counts: Counts, now_ns: Callable[[], int], flush_every_s: float
    ) -> None:
        self._pool = pool
        self._log = log
        self._ending = ending
        self._counts = counts
        self._now_ns = now_ns
        self._flush_every_s = flush_every_s
        self._flush_at_ns = 0
        self._flush_took_s = 0.0
        self._seats: list[WorkerSeat] = []
        self._unwritten: list[LedgerEntry] = []

    def flush_soon(self) -> None:
        soon_s = max(FLUSH_SOON_S, self._flush_took_s / FLUSH_SHARE)
        self._flush_at_ns = min(self._flush_at_ns, self._now_ns() + round(soon_s * NS_PER_S))

    def flush_if_due(self) -> None:
        if self._now_ns() >= self._flush_at_ns:
            self.flush()

    def flush(self) -> None:
        """Write everything up to now, and renew the lease."""
        started_s = time.monotonic()
        self._note_seats()
        running = self.count_spent()
        unwritten, self._unwritten = self._unwritten, []
        self._log.write_ledger(unwritten, running, self._now_ns())
        self._flush_took_s = time.monotonic() - started_s
        # From its end on, however long it took: what happens meanwhile must not make the next one due at once.
        self._flush_at_ns = self._now_ns() + round(self._flush_every_s * NS_PER_S)

    def count_spent(self) -> list[LedgerEntry]:
        """Take the pool's ledger up to now; returns the running entries."""
        closed, running = self._pool.take_ledger()
        self._unwritten += closed
        self._ending.charges.add(closed)
        self._counts.spent_usd += float(sum((entry.cost_usd for entry in closed), Decimal(0)))
        return running

    @property
    def num_held_workers(self) -> int:
        return len({seat.group_id for seat in self._seats if seat.released_ns is None})

    def _note_seats(self) -> None:
        """Write down who is held before what they do: whoever closes a dead run goes by the seats."""
        seats = self._pool.seats()
        if seats != self._seats:
            self._seats = seats
            self._log.set_workers(seats)
