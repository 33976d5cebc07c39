"""The driver loop over a pool that a test controls: what it hands out, settles, retries, gives up and writes."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import Ending, StopRequest
from pipeline.cluster.pool import Finished, Held, Noted, PoolEvent, WorkerBroken, WorkerGone
from pipeline.cluster.progress import Counts, Progress
from pipeline.errors import CheckpointMismatch, Interrupted, StorageFull
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.planning.timetable import Fleet
from pipeline.records.outcome import Failed, LedgerEntry, Outcome, WorkerSeat, commit_record, rendered_row
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem
from tests.unit.makers import FACTS, S, entry, item, rendered, seat

Script = Callable[[WorkItem], PoolEvent]


class ScriptedPool:
    """One worker that answers each item as its script says, a second of ledger an item."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.events: deque[PoolEvent] = deque()
        self.closed: list[LedgerEntry] = []
        self.started = self.stopped = self.abandoned = self.is_draining = False
        self.submitted: list[WorkItem] = []
        self.cancelled: list[WorkItem] = []
        self.wanted: list[int] = []

    def start(self) -> None:
        self.started = True

    def num_free(self, layout: ParallelLayout) -> int:
        return 0 if self.events else 1

    def fleet(self) -> Fleet:
        return Fleet(1, 1)

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None:
        self.wanted.append(sum(workers.values()))

    def cancel(self, item: WorkItem) -> None:
        self.cancelled.append(item)

    def drain(self) -> None:
        self.is_draining = True

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        t = len(self.submitted)
        self.closed.append(entry("denoise", t, t + 1, item.request.id, item.attempt))
        self.submitted.append(item)
        self.events.append(self.script(item))

    def next_event(self, timeout_s: float) -> PoolEvent | None:
        return self.events.popleft() if self.events else None

    def seats(self) -> list[WorkerSeat]:
        return [seat()]

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        taken, self.closed = self.closed, []
        return taken, []

    def stop(self, *, abandon: bool) -> None:
        self.stopped, self.abandoned = True, abandon


class MemoryLog:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.entries: list[LedgerEntry] = []

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        self.events.append(event)

    def set_workers(self, seats: list[WorkerSeat]) -> None: ...

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None:
        self.entries.extend(closed)


def fails(fault: str) -> Script:
    return lambda work: Finished(Failed(work, fault, f"{fault} happened", fault, 0, S))


def succeeds(work: WorkItem) -> PoolEvent:
    outcome: Outcome = rendered(work)
    return Finished(outcome)


def drive(items: list[WorkItem], script: Script, **changes: Any) -> tuple[Ending, ScriptedPool, MemoryLog]:
    pool, log = ScriptedPool(script), MemoryLog()
    settings: dict[str, Any] = {"admission": Admission(), "stop": StopRequest(), **changes}
    driver = Driver(
        queue=WorkQueue(items), pool=pool, log=log, facts=FACTS, counts=Counts(len(items), 0, 0),
        progress=Progress(io.StringIO()), now_ns=lambda: 5 * S, flush_every_s=1.0, **settings,
    )  # fmt: skip
    return driver.drive(), pool, log


def gone(*held: WorkItem, fault: str = "WorkerLost", is_suspect: bool = True) -> WorkerGone:
    return WorkerGone("cpu-0: exit code 9", tuple(Held(work, 0, is_suspect) for work in held), fault)


def statuses(ending: Ending) -> dict[str, str]:
    return {row["id"]: row["status"] for row in ending.rows}


def test_every_item_is_rendered_and_the_worker_released() -> None:
    ending, pool, log = drive([item(i) for i in range(3)], succeeds)
    assert set(statuses(ending).values()) == {"rendered"} and len(ending.rows) == 3
    assert pool.stopped and not pool.abandoned
    assert len(ending.charges.by_attempt) == len(log.entries) == 3
    assert log.events == ["attempt_started", "rendered"] * 3


def test_nothing_to_do_starts_no_worker() -> None:
    ending, pool, _ = drive([], succeeds)
    assert ending.rows == [] and not pool.started


def test_a_fault_is_tried_again_and_then_set_aside_without_stopping_the_others() -> None:
    def script(work: WorkItem) -> PoolEvent:
        return fails("EngineFault")(work) if work.request.id == "row-1" else succeeds(work)

    ending, pool, _ = drive([item(i) for i in range(3)], script)
    assert statuses(ending) == {"row-0": "rendered", "row-1": "failed", "row-2": "rendered"}
    assert [(w.request.id, w.attempt) for w in pool.submitted] == [
        ("row-0", 1), ("row-1", 1), ("row-1", 2), ("row-2", 1),
    ]  # fmt: skip
    (failed,) = [row for row in ending.rows if row["status"] == "failed"]
    assert (failed["attempts"], failed["error_message"]) == (2, "EngineFault happened")


def test_a_second_attempt_that_succeeds_is_the_one_that_is_charged() -> None:
    ending, _, _ = drive([item(0)], lambda work: succeeds(work) if work.attempt == 2 else fails("EngineFault")(work))
    assert ending.rendered_attempts == {"row-0": 2}


def test_twins_of_a_rendered_row_are_skipped_with_its_video() -> None:
    ending, pool, _ = drive([item(0, key="k"), item(1, key="k")], succeeds)
    assert statuses(ending) == {"row-0": "rendered", "row-1": "skipped"}
    assert len({row["uri"] for row in ending.rows}) == 1 and len(pool.submitted) == 1


def test_a_full_disk_stops_the_job_and_leaves_the_rest_not_started() -> None:
    ending, pool, _ = drive([item(i) for i in range(3)], fails("StorageFull"))
    assert ending.stopped_by is not None and ending.stopped_by.exit_code == 6
    assert set(statuses(ending).values()) == {"not_started"} and len(ending.rows) == 3
    assert len(pool.submitted) == 1 and pool.abandoned


def test_a_worker_that_cannot_be_set_up_ends_the_job_with_its_own_code() -> None:
    ending, _, _ = drive([item(0), item(1)], lambda work: WorkerBroken(CheckpointMismatch("tensors differ")))
    assert ending.stopped_by is not None and ending.stopped_by.exit_code == 2
    assert set(statuses(ending).values()) == {"not_started"}


def test_a_bug_in_a_workers_set_up_ends_the_job_with_code_1_and_its_cause() -> None:
    ending, _, _ = drive([item(0)], lambda work: WorkerBroken(ZeroDivisionError("oops")))
    assert ending.stopped_by is not None and ending.stopped_by.exit_code == 1
    assert "ZeroDivisionError: oops" in str(ending.stopped_by)


def test_a_stop_request_ends_the_run_between_two_items() -> None:
    stop = StopRequest()

    def script(work: WorkItem) -> PoolEvent:
        stop.reason = "interrupted"
        return succeeds(work)

    ending, pool, _ = drive([item(i) for i in range(3)], script, stop=stop)
    assert isinstance(ending.stopped_by, Interrupted) and pool.abandoned
    assert sorted(statuses(ending).values()) == ["not_started", "not_started", "rendered"]


def test_a_budget_scales_estimates_by_what_clips_really_cost() -> None:
    """An item is estimated at a cent and costs a dollar: after the first the next one is known to cost a dollar."""
    ending, pool, _ = drive([item(i) for i in range(3)], succeeds, admission=Admission(budget_usd=1.5))
    assert len(pool.submitted) == 1
    assert "budget_usd is 1.5: 1.000000 spent" in (ending.limit_reached or "")
    assert sorted(statuses(ending).values()) == ["not_started", "not_started", "rendered"]


def test_a_budget_too_small_for_the_first_clip_starts_no_worker() -> None:
    ending, pool, _ = drive([item(0)], succeeds, admission=Admission(budget_usd=0.001))
    assert ending.limit_reached is not None and not pool.started


def test_a_clip_that_is_committed_while_the_run_stops_is_rendered_and_not_given_up() -> None:
    stop = StopRequest()

    class LatePool(ScriptedPool):
        def next_event(self, timeout_s: float) -> PoolEvent | None:
            stop.reason = "interrupted"
            return super().next_event(timeout_s) if self.stopped else None

    pool, log = LatePool(succeeds), MemoryLog()
    driver = Driver(
        queue=WorkQueue([item(0), item(1)]), pool=pool, log=log, facts=FACTS, counts=Counts(2, 0, 0),
        progress=Progress(io.StringIO()), now_ns=lambda: 5 * S, flush_every_s=1.0, admission=Admission(), stop=stop,
    )  # fmt: skip
    ending = driver.drive()
    assert isinstance(ending.stopped_by, Interrupted)
    assert statuses(ending) == {"row-0": "rendered", "row-1": "not_started"}
    assert ending.rendered_attempts == {"row-0": 1}


def test_a_ledger_that_cannot_be_written_ends_the_job_with_its_books_in_the_ending() -> None:
    class FullDisk(MemoryLog):
        def write_ledger(self, *args: Any) -> None:
            raise StorageFull("disk full")

    log = FullDisk()
    driver = Driver(
        queue=WorkQueue([item(0)]), pool=ScriptedPool(succeeds), log=log, facts=FACTS, counts=Counts(1, 0, 0),
        progress=Progress(io.StringIO()), now_ns=lambda: 5 * S, flush_every_s=1.0, admission=Admission(),
        stop=StopRequest(),
    )  # fmt: skip
    ending = driver.drive()
    assert isinstance(ending.stopped_by, StorageFull)
    assert statuses(ending) == {"row-0": "not_started"}


def test_an_item_that_kills_two_workers_is_set_aside_with_the_cause() -> None:
    def script(work: WorkItem) -> PoolEvent:
        return gone(work) if work.request.id == "row-0" else succeeds(work)

    ending, _, log = drive([item(0), item(1)], script)
    assert statuses(ending) == {"row-0": "failed", "row-1": "rendered"}
    (failed,) = [row for row in ending.rows if row["status"] == "failed"]
    assert (failed["attempts"], failed["error_class"]) == (2, "WorkerLost")
    assert failed["error_message"] == "killed 2 workers: cpu-0: exit code 9"
    assert log.events.count("worker_lost") == 2


def test_a_worker_lost_after_its_commit_has_rendered_its_item() -> None:
    def record_of(work: WorkItem) -> dict[str, Any]:
        return commit_record(rendered(work), (), FACTS)

    ending, pool, _ = drive([item(0)], lambda work: gone(work), committed=record_of)
    (row,) = ending.rows
    expected = rendered_row(rendered(item(0)), FACTS)
    assert {name: row[name] for name in expected} == expected
    assert len(pool.submitted) == 1 and ending.rendered_attempts == {"row-0": 1}


class Farm:
    """Workers whose events a test sends itself, and a clock that it moves."""

    def __init__(self, items: list[WorkItem], num_workers: int, **changes: Any) -> None:
        self.now_s = 0.0
        self.pool = self._Pool(self, num_workers)
        self.log = MemoryLog()
        self.stop = StopRequest()
        self.driver = Driver(
            queue=WorkQueue(items), pool=self.pool, log=self.log, facts=FACTS, counts=Counts(len(items), 0, 0),
            progress=Progress(io.StringIO()), now_ns=lambda: round(self.now_s * S), flush_every_s=1.0,
            **{"admission": Admission(), "stop": self.stop, **changes},
        )  # fmt: skip
        # What happens at which time.
        self.script: list[tuple[float, Callable[[], PoolEvent | None]]] = []

    def at(self, time_s: float, make: Callable[[], PoolEvent | None]) -> None:
        self.script.append((time_s, make))
        self.script.sort(key=lambda entry: entry[0])

    class _Pool(ScriptedPool):
        def __init__(self, farm: Farm, num_workers: int) -> None:
            super().__init__(succeeds)
            self.farm, self.free = farm, num_workers

        def num_free(self, layout: ParallelLayout) -> int:
            return self.free if self.started else 1

        def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
            self.free -= 1
            self.submitted.append(item)

        def next_event(self, timeout_s: float) -> PoolEvent | None:
            self.farm.now_s += timeout_s
            if timeout_s and self.farm.script and self.farm.script[0][0] <= self.farm.now_s:
                event = self.farm.script.pop(0)[1]()
                self.free += isinstance(event, Finished | WorkerGone)
                return event
            assert self.farm.now_s < 10_000, "the driver waits for ever"
            return None

    def ends(self, time_s: float, index: int, taken_s: float = 2.0) -> None:
        """The `index`-th submitted item is rendered, after `taken_s`."""

        def make() -> PoolEvent:
            work = self.pool.submitted[index]
            return Finished(replace(rendered(work), finished_ns=round(taken_s * S)))

        self.at(time_s, make)


def test_an_item_that_was_not_alone_in_a_lost_worker_is_tried_alone_without_a_mark() -> None:
    farm = Farm([item(0), item(1)], 1)
    farm.at(1, lambda: gone(*farm.pool.submitted, is_suspect=False))
    farm.pool.free = 2
    farm.ends(2, 2)
    farm.ends(3, 3)
    ending = farm.driver.drive()
    assert set(statuses(ending).values()) == {"rendered"}
    assert [(w.attempt, w.alone) for w in farm.pool.submitted] == [(1, False), (1, False), (2, True), (2, True)]
    assert ending.wasted == {("row-0", 1): "WorkerLost", ("row-1", 1): "WorkerLost"}


def test_a_preempted_item_goes_back_without_a_mark_however_often() -> None:
    farm = Farm([item(0)], 1)
    for index in range(12):
        farm.at(index + 1, lambda: gone(farm.pool.submitted[-1], fault="Preempted"))
    farm.ends(20, 12)
    ending = farm.driver.drive()
    assert statuses(ending) == {"row-0": "rendered"} and len(farm.pool.submitted) == 13


def test_a_clip_that_does_not_fit_is_rendered_on_a_lower_rung_and_says_so() -> None:
    farm = Farm([item(0)], 1)
    farm.at(1, lambda: fails("OutOfMemory")(farm.pool.submitted[0]))
    farm.ends(2, 1)
    (row,) = farm.driver.drive().rows
    assert (row["status"], row["memory_rung"]) == ("rendered", "small_decode_chunks")


def test_workers_that_are_lost_without_end_end_the_job_with_code_6_and_the_cause() -> None:
    farm = Farm([item(0)], 0)

    def lost() -> PoolEvent:
        farm.pool.free = -1  # it never became ready, and the next one will not either
        return WorkerGone("cpu-0: cannot allocate")

    for index in range(10):
        farm.at(index + 1, lost)
    ending = farm.driver.drive()
    assert ending.stopped_by is not None and ending.stopped_by.exit_code == 6
    assert "cpu-0: cannot allocate" in str(ending.stopped_by) and statuses(ending) == {"row-0": "not_started"}


def test_more_failed_rows_than_allowed_end_the_job() -> None:
    ending, _, _ = drive([item(i) for i in range(5)], fails("InvalidRequest"), admission=Admission(max_failed_rows=1))
    assert ending.stopped_by is not None and "max_failed_rows=1" in str(ending.stopped_by)
    assert sorted(statuses(ending).values()) == ["failed", "failed", "not_started", "not_started", "not_started"]


def test_an_idle_worker_tries_a_straggler_too_and_the_first_to_end_wins() -> None:
    farm = Farm([item(i) for i in range(4)], 4)
    for index in (0, 1, 2):
        farm.ends(2, index)
    farm.ends(40, 4)  # the rival of row 3, which never ends
    ending = farm.driver.drive()
    assert [(w.request.id, w.attempt) for w in farm.pool.submitted[3:]] == [("row-3", 1), ("row-3", 2)]
    assert [(w.request.id, w.attempt) for w in farm.pool.cancelled] == [("row-3", 1)]
    assert set(statuses(ending).values()) == {"rendered"} and ending.rendered_attempts["row-3"] == 2
    assert farm.pool.abandoned  # nobody waits for the loser


def test_the_loser_of_a_race_is_booked_as_a_duplicate() -> None:
    farm = Farm([item(i) for i in range(5)], 4)
    for index in (0, 1, 2):
        farm.ends(2, index)
    farm.ends(3, 4, taken_s=1.0)
    farm.ends(30, 3)  # the straggler after all
    farm.ends(30.1, 5)  # and its rival, too late
    ending = farm.driver.drive()
    assert len(ending.rows) == 5 and ending.rendered_attempts["row-3"] == 1
    assert ending.wasted in ({("row-3", 2): "duplicate"}, {})


def test_no_straggler_is_raced_before_enough_clips_have_ended_to_tell_one() -> None:
    farm = Farm([item(i) for i in range(3)], 4)
    farm.ends(2, 0)
    farm.ends(2, 1)
    farm.ends(500, 2)
    farm.driver.drive()
    assert len(farm.pool.submitted) == 3


def test_after_a_signal_what_can_end_in_the_notice_ends_and_nothing_starts() -> None:
    farm = Farm([item(i) for i in range(4)], 2)
    farm.ends(2, 0)

    def interrupt() -> None:
        farm.stop.reason, farm.stop.notice_s = "SIGTERM", 1.5

    farm.at(3, interrupt)  # row 2 began at 2 and takes 2 s; row 1 is late, so it may end at any time
    farm.ends(3.9, 2)
    ending = farm.driver.drive()
    assert isinstance(ending.stopped_by, Interrupted) and farm.pool.is_draining
    assert statuses(ending) == {
        "row-0": "rendered",
        "row-2": "rendered",
        "row-1": "not_started",
        "row-3": "not_started",
    }
    assert farm.now_s == pytest.approx(4.5, abs=0.3) and ending.wasted == {("row-1", 1): "given_up"}


def test_after_a_signal_nothing_is_waited_for_that_cannot_end_in_the_notice() -> None:
    farm = Farm([item(0)], 1)

    def interrupt() -> None:
        farm.stop.reason, farm.stop.notice_s = "SIGTERM", 0.5

    farm.at(0.3, interrupt)
    ending = farm.driver.drive()
    assert isinstance(ending.stopped_by, Interrupted) and farm.now_s < 0.6


def test_at_the_deadline_what_is_in_flight_goes_back() -> None:
    farm = Farm([item(0), item(1)], 1, admission=Admission(deadline_ns=3 * S))
    ending = farm.driver.drive()
    assert ending.limit_reached is not None and farm.now_s == pytest.approx(3.0, abs=0.2)
    assert set(statuses(ending).values()) == {"not_started"} and farm.pool.abandoned


def test_the_pool_is_told_how_many_workers_the_queue_can_use() -> None:
    farm = Farm([item(i) for i in range(3)], 1)
    for index in range(3):
        farm.ends(index + 1, index)
    farm.driver.drive()
    assert farm.pool.wanted[0] == 3 and farm.pool.wanted[-1] == 1


def test_what_a_pool_notes_is_in_the_event_log() -> None:
    farm = Farm([item(0)], 1)
    farm.at(1, lambda: Noted("node_draining", {"node": "n1"}))
    farm.ends(2, 0)
    farm.driver.drive()
    assert "node_draining" in farm.log.events


def test_a_clip_that_another_run_committed_first_is_ours_to_show_and_our_time_is_a_duplicate() -> None:
    def script(work: WorkItem) -> PoolEvent:
        return Finished(replace(rendered(work), adopted_from="run-2"))

    ending, _, _ = drive([item(0)], script)
    assert statuses(ending) == {"row-0": "rendered"} and ending.rows[0]["rendered_by_run"] == "run-2"
    assert ending.rendered_attempts == {} and ending.wasted == {("row-0", 1): "duplicate"}


def test_a_clip_that_a_lost_gang_committed_in_its_last_moment_is_not_rendered_again() -> None:
    farm = Farm([item(0), item(1)], 1)
    asked: list[str] = []

    def record_of(work: WorkItem) -> dict[str, Any] | None:
        asked.append(work.request.id)
        return None if len(asked) == 1 else commit_record(rendered(farm.pool.submitted[0]), (), FACTS)

    farm.driver.committed = record_of
    farm.at(1, lambda: gone(farm.pool.submitted[0]))
    farm.ends(2, 1)
    ending = farm.driver.drive()
    assert [work.request.id for work in farm.pool.submitted] == ["row-0", "row-1"] and asked == ["row-0", "row-0"]
    assert set(statuses(ending).values()) == {"rendered"} and ending.rendered_attempts["row-0"] == 1
    assert ending.wasted == {}
