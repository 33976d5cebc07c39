"""The ledger partitions held time, and its cost reaches the rows without loss."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise

import pytest

from pipeline.cost.allocation import Charges, allocate
from pipeline.cost.meter import Meter, utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.records.outcome import LedgerEntry
from tests.unit.makers import entry, seat


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        self.ns += 7
        return self.ns


def test_entries_partition_the_time_from_acquired_to_released() -> None:
    meter = Meter(seat(), UnitPrice("p", Decimal(1)), Clock())
    meter.enter("weight_load")
    for attempt in (1, 2):
        for state in ("text_encode", "denoise", "denoise", "decode"):
            meter.enter(state, id="a", attempt=attempt)
    meter.enter("idle")
    released_ns = meter.release()
    entries = meter.take_closed()
    assert entries[0].t0_ns == 0 and entries[-1].t1_ns == released_ns
    assert all(a.t1_ns == b.t0_ns for a, b in pairwise(entries))
    assert [e.state for e in entries] == [
        "provisioning",
        "weight_load",
        *["text_encode", "denoise", "decode"] * 2,
        "idle",
    ]


def test_nothing_is_accounted_after_release() -> None:
    meter = Meter(seat(), UnitPrice("p", Decimal(1)), Clock())
    released_ns = meter.release()
    meter.enter("denoise", id="a", attempt=1)
    assert meter.release() == released_ns
    assert len(meter.take_closed()) == 1 and meter.take_closed() == []
    assert meter.open_entry() is None


def test_the_entries_of_an_attempt_are_its_own_and_run_up_to_now() -> None:
    meter = Meter(seat(), UnitPrice("p", Decimal(1)), Clock())
    meter.enter("denoise", id="a", attempt=1)
    meter.enter("idle")
    meter.enter("denoise", id="a", attempt=2)
    meter.enter("upload", id="a", attempt=2)
    assert [(e.state, e.attempt) for e in meter.entries_of("a", 2)] == [("denoise", 2), ("upload", 2)]
    meter.forget("a", 2)
    assert meter.entries_of("a", 1)[0].state == "denoise"


def test_what_the_host_does_shows_only_while_the_device_is_vacant() -> None:
    meter = Meter(seat(), UnitPrice("p", Decimal(1)), Clock())
    meter.enter("denoise", id="a", attempt=1)
    meter.enter_host("encode", id="a", attempt=1)
    meter.enter("idle")  # the device is done with a, the host is not
    meter.enter("denoise", id="b", attempt=1)
    meter.enter_host("upload", id="a", attempt=1)
    meter.leave_host()
    meter.enter("idle")
    meter.drain()
    meter.release()
    closed = meter.take_closed()
    assert [(e.state, e.id) for e in closed] == [
        ("provisioning", None), ("denoise", "a"), ("encode", "a"), ("denoise", "b"), ("idle", None), ("drain", None),
    ]  # fmt: skip
    assert all(a.t1_ns == b.t0_ns for a, b in pairwise(closed))


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state must be one of"):
        Meter(seat(), UnitPrice("p", Decimal(1)), Clock()).enter("napping")


def test_the_clock_does_not_run_backwards() -> None:
    now_ns = utc_clock()
    readings = [now_ns() for _ in range(1000)]
    assert readings == sorted(readings)


def summed(ledger: list[LedgerEntry]) -> Charges:
    charges = Charges()
    charges.add(ledger)
    return charges


def test_cold_start_and_idle_are_shared_by_the_rendered_rows_in_proportion() -> None:
    ledger = [
        entry("weight_load", 0, 10),
        entry("denoise", 10, 11, "a", 1),
        entry("idle", 11, 13),
        entry("denoise", 13, 16, "b", 1),
    ]
    result = allocate(summed(ledger), {"a": 1, "b": 1})
    assert (result.rows["a"].direct, result.rows["b"].direct) == (1, 3)
    assert (result.rows["a"].loaded, result.rows["b"].loaded) == (4, 12)
    assert result.total == sum(row.loaded for row in result.rows.values()) == 16
    assert result.unallocated == 0


def test_a_poison_row_pays_for_itself_and_a_retried_row_for_its_retry() -> None:
    ledger = [
        entry("denoise", 0, 2, "bad", 1),
        entry("denoise", 2, 4, "bad", 2),
        entry("denoise", 4, 5, "good", 1),
        entry("denoise", 5, 9, "good", 2),
        entry("idle", 9, 10),
    ]
    result = allocate(summed(ledger), {"good": 2}, {("bad", 1): "Hang", ("bad", 2): "EngineFault"})
    assert result.rows["bad"].loaded == result.rows["bad"].waste == 4
    assert (result.rows["good"].direct, result.rows["good"].waste, result.rows["good"].loaded) == (4, 1, 6)
    assert sum(row.loaded for row in result.rows.values()) == result.total
    assert result.wasted == {"Hang": 2, "EngineFault": 2, "given_up": 1}


def test_with_nothing_rendered_the_shared_time_stays_unallocated() -> None:
    result = allocate(summed([entry("weight_load", 0, 10)]), {})
    assert result.unallocated == result.total == 10
