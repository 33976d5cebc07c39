"""The worker on a thread of this process: what is alone, what hangs, what is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal

import pytest

from pipeline.cluster.assignment import Assignment, signs_of_life
from pipeline.cluster.local_pool import LocalPool
from pipeline.cluster.pool import Finished, Freed, PoolEvent, WorkerBroken
from pipeline.cost.meter import Meter, utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.errors import Cancelled, Hang
from pipeline.records.gang import Member
from pipeline.records.outcome import Failed
from pipeline.records.work import ALONE
from tests.unit.makers import S, item, rendered, seat

Do = Callable[[Assignment], None]


def pool_that(does: Do, hang_after_s: float | None = None) -> LocalPool:
    class Worker:
        def execute(self, assignment: Assignment) -> None:
            does(assignment)

    def acquire() -> Meter:
        return Meter(seat(), UnitPrice("p", Decimal(1)), utc_clock())

    def build(meter: Meter, member: Member) -> Worker:
        return Worker()

    pool = LocalPool(build, acquire, hang_after_s=hang_after_s)
    pool.start()
    return pool


def events_of(pool: LocalPool, within_s: float = 5.0) -> Iterator[PoolEvent]:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if (event := pool.next_event(0.05)) is not None:
            yield event


def first(pool: LocalPool, kind: type[PoolEvent]) -> PoolEvent:
    return next(event for event in events_of(pool) if isinstance(event, kind))


def test_a_worker_is_free_for_the_next_item_before_the_last_one_has_ended() -> None:
    open_ends: list[Assignment] = []
    pool = pool_that(open_ends.append)
    pool.submit(item(0))
    while pool.num_free(ALONE) == 0:
        first(pool, Freed)
    pool.submit(item(1))
    while len(open_ends) < 2:
        first(pool, Freed)
    for assignment in open_ends:
        assignment.end(rendered(assignment.item))
    ended = [event for event in events_of(pool, 0.3) if isinstance(event, Finished)]
    assert [event.outcome.item.request.id for event in ended] == ["row-0", "row-1"]
    pool.stop(abandon=False)


def test_an_item_that_is_to_be_alone_waits_for_the_others_and_lets_none_begin() -> None:
    begun: list[Assignment] = []
    pool = pool_that(begun.append)
    pool.submit(item(0))
    while pool.num_free(ALONE) == 0:
        first(pool, Freed)
    pool.submit(replace(item(1), alone=True))
    list(events_of(pool, 0.2))
    assert [each.item.request.id for each in begun] == ["row-0"]
    begun[0].end(rendered(begun[0].item))
    first(pool, Finished)
    list(events_of(pool, 0.2))
    assert [each.item.request.id for each in begun] == ["row-0", "row-1"] and pool.num_free(ALONE) == 0
    begun[1].end(rendered(begun[1].item))
    first(pool, Finished)
    first(pool, Freed)
    assert pool.num_free(ALONE) == 1
    pool.stop(abandon=False)


def test_a_worker_that_is_silent_ends_the_job_once() -> None:
    pool = pool_that(lambda assignment: threading.Event().wait(), hang_after_s=0.2)
    pool.submit(item(0))
    broken = first(pool, WorkerBroken)
    assert isinstance(broken, WorkerBroken) and isinstance(broken.error, Hang) and "row-0" in str(broken.error)
    assert list(events_of(pool, 0.3)) == []
    pool.stop(abandon=True)


def test_an_item_that_is_only_being_finished_hangs_too() -> None:
    pool = pool_that(lambda assignment: assignment.beat("encode"), hang_after_s=0.2)
    pool.submit(item(0))
    assert isinstance(first(pool, WorkerBroken), WorkerBroken)
    pool.stop(abandon=True)


def test_signs_of_life_keep_an_item_from_hanging() -> None:
    def slow(assignment: Assignment) -> None:
        with signs_of_life(assignment, "upload", 0.05):
            time.sleep(0.6)
        assignment.end(rendered(assignment.item))

    pool = pool_that(slow, hang_after_s=0.3)
    pool.submit(item(0))
    kinds = [type(event) for event in events_of(pool, 1.0)]
    assert Finished in kinds and WorkerBroken not in kinds
    pool.stop(abandon=False)


def test_a_cancelled_item_ends_at_its_next_sign_of_life() -> None:
    def steps(assignment: Assignment) -> None:
        try:
            for step in range(1000):
                assignment.beat("denoise", step, 1000)
                time.sleep(0.01)
        except Cancelled as error:
            assignment.end(Failed(assignment.item, "Cancelled", str(error), "Cancelled", 0, S))

    pool = pool_that(steps)
    pool.submit(item(0))
    list(events_of(pool, 0.1))
    pool.cancel(item(0))
    ended = first(pool, Finished)
    assert isinstance(ended, Finished) and isinstance(ended.outcome, Failed) and ended.outcome.fault == "Cancelled"
    pool.stop(abandon=False)


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3)])
def test_a_worker_that_raises_is_broken(error: BaseException) -> None:
    def raises(assignment: Assignment) -> None:
        raise error

    pool = pool_that(raises)
    pool.submit(item(0))
    assert isinstance(first(pool, WorkerBroken), WorkerBroken)
    pool.stop(abandon=True)
