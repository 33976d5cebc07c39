"""The ledgers of all ranks of a pool, gathered for the driver: what is closed, what runs, and whose seats there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipeline.cluster.rank_ledger import RankLedger
from pipeline.cluster.rank_report import Report
from pipeline.cluster.worker_group import Rank, WorkerGroup
from pipeline.records.outcome import LedgerEntry, WorkerSeat


class PoolLedger:
    """`now_ns` is the run's clock."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._ledgers: dict[str, RankLedger] = {}
        self._running: dict[str, LedgerEntry] = {}
        self._closed: list[LedgerEntry] = []
        self.seats: list[WorkerSeat] = []

    def add(self, ledger: RankLedger) -> None:
        """One more rank is held from now on."""
        self._ledgers[ledger.seat.gpu_id] = ledger
        self.note_seats()

    def hear(self, rank: Rank, report: Report, *, is_leaving: bool) -> None:
        assert rank.ledger is not None, "it had a seat before its worker"
        rank.ledger.take(report.closed, report.running, report.released_ns)
        self._closed += rank.ledger.take_closed()
        if report.running is not None and not is_leaving:
            self._running[rank.gpu_id] = report.running

    def retire(self, group: WorkerGroup) -> None:
        """What its ranks are at is asked of their own ledgers from now on."""
        for rank in group.ranks:
            self._running.pop(rank.gpu_id, None)

    def lose(self, group: WorkerGroup) -> None:
        """Its ranks can report no more."""
        for rank in group.ranks:
            if rank.ledger is not None:
                rank.ledger.lose(self._now_ns())
                self._closed += rank.ledger.take_closed()

    def release(self, group: WorkerGroup) -> None:
        """Its place is free: the ledgers of its ranks end."""
        for rank in group.ranks:
            if rank.ledger is not None:
                rank.ledger.release(self._now_ns())
                self._closed += rank.ledger.take_closed()
        self.note_seats()

    def note_seats(self) -> None:
        """Always a new list: who compares it with the last one must see a change."""
        self.seats = [ledger.seat for ledger in self._ledgers.values()]

    def take(self, leaving: Iterable[WorkerGroup]) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        """The entries closed since the last call, and the running ones, with those of the groups that are `leaving`."""
        closed, self._closed = self._closed, []
        now_ns = self._now_ns()
        ledgers = [rank.ledger for group in leaving for rank in group.ranks if rank.ledger is not None]
        ending = [entry for ledger in ledgers if (entry := ledger.running(now_ns)) is not None]
        return closed, [*self._running.values(), *ending]
