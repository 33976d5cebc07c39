"""The ledger of a rank partitions its time, however the rank ends."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise

from pipeline.cluster.rank_ledger import RankLedger
from pipeline.cost.pricing import UnitPrice
from pipeline.records.outcome import LedgerEntry
from tests.unit.makers import S, entry, seat

PRICE = UnitPrice("p", Decimal(3600))


def states(ledger: RankLedger) -> list[tuple[str, float, float]]:
    entries = sorted(ledger.take_closed(), key=lambda e: e.t0_ns)
    assert all(a.t1_ns == b.t0_ns for a, b in pairwise(entries))
    assert entries[0].t0_ns == ledger.seat.acquired_ns and entries[-1].t1_ns == ledger.seat.released_ns
    return [(e.state, e.t0_ns / S, e.t1_ns / S) for e in entries]


def reporting() -> tuple[RankLedger, LedgerEntry]:
    ledger, running = RankLedger(seat(), PRICE), entry("denoise", 2, 5, "row-0", 1)
    ledger.take((entry("provisioning", 0, 1), entry("weight_load", 1, 2)), running, None)
    return ledger, running


def test_a_lost_rank_is_unknown_since_its_last_report_and_torn_down_until_its_place_is_free() -> None:
    ledger, running = reporting()
    assert ledger.running(6 * S) == running
    ledger.lose(7 * S)
    torn_down = ledger.running(9 * S)
    assert torn_down is not None and (torn_down.state, torn_down.t0_ns, torn_down.t1_ns) == ("teardown", 7 * S, 9 * S)
    ledger.release(10 * S)
    assert ledger.running(11 * S) is None
    assert states(ledger) == [("provisioning", 0, 1), ("weight_load", 1, 2), ("denoise", 2, 5), ("unknown", 5, 7),
                              ("teardown", 7, 10)]  # fmt: skip


def test_what_a_lost_rank_says_late_is_not_booked_twice() -> None:
    ledger, _ = reporting()
    ledger.lose(7 * S)
    ledger.take((entry("denoise", 2, 6, "row-0", 1),), entry("idle", 6, 8), 8 * S)
    ledger.release(10 * S)
    assert [state for state, _, _ in states(ledger)] == ["provisioning", "weight_load", "denoise", "unknown",
                                                         "teardown"]  # fmt: skip


def test_a_rank_that_said_farewell_is_released_when_it_says() -> None:
    ledger, _ = reporting()
    ledger.take((entry("denoise", 2, 6, "row-0", 1), entry("idle", 6, 8)), None, 8 * S)
    ledger.release(10 * S)
    assert ledger.seat.released_ns == 8 * S and states(ledger)[-1] == ("idle", 6, 8)


def test_a_rank_that_never_reported_is_unknown_from_its_birth() -> None:
    ledger = RankLedger(seat(), PRICE)
    ledger.lose(3 * S)
    ledger.release(3 * S)
    assert states(ledger) == [("unknown", 0, 3)]


def test_an_answer_that_comes_after_the_last_report_is_booked_but_nothing_runs_any_more() -> None:
    ledger, running = reporting()
    ledger.take((entry("idle", 6, 8),), None, 8 * S)
    ledger.take((entry("denoise", 2, 6, "row-0", 1),), running, None)
    assert ledger.running(9 * S) is None
    booked = sorted(ledger.take_closed(), key=lambda e: e.t0_ns)
    assert [(e.state, e.t0_ns / S, e.t1_ns / S) for e in booked][-2:] == [("denoise", 2, 6), ("idle", 6, 8)]


def test_a_report_that_never_came_leaves_unknown_time_and_no_gap() -> None:
    ledger, _ = reporting()
    ledger.take((entry("upload", 6, 7), entry("teardown", 7, 8)), None, 8 * S)
    ledger.release(9 * S)
    ledger.take((entry("denoise", 2, 6),), None, None)  # too late to be booked
    assert states(ledger)[2:] == [("unknown", 2, 6), ("upload", 6, 7), ("teardown", 7, 8)]


def test_reports_out_of_their_order_are_one_partition() -> None:
    ledger, _ = reporting()
    ledger.take((entry("teardown", 6, 8),), None, 8 * S)
    ledger.take((entry("denoise", 2, 6),), None, None)
    ledger.release(9 * S)
    assert [state for state, _, _ in states(ledger)] == ["provisioning", "weight_load", "denoise", "teardown"]
