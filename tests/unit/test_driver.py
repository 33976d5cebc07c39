"""The driver loop over a pool that a test controls: what it hands out, settles, retries, gives up and writes."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.cluster.driver import Driver, Ending, StopRequest
from pipeline.cluster.pool import Finished, PoolEvent, WorkerBroken, WorkerGone
from pipeline.cluster.progress import Counts, Progress
from pipeline.errors import CheckpointMismatch, Interrupted, StorageFull
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.records.outcome import Failed, LedgerEntry, Outcome, WorkerSeat, commit_record, rendered_row
from pipeline.records.work import WorkItem
from tests.unit.makers import FACTS, S, entry, item, rendered, seat

Script = Callable[[WorkItem], PoolEvent]


class ScriptedPool:
    """One worker that answers each item as its script says, a second of ledger an item."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.events: deque[PoolEvent] = deque()
        self.closed: list[LedgerEntry] = []
        self.started = self.stopped = self.abandoned = False
        self.submitted: list[WorkItem] = []

    def start(self) -> None:
        self.started = True

    def num_free(self) -> int:
        return 0 if self.events else 1

    def submit(self, item: WorkItem) -> None:
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


def statuses(ending: Ending) -> dict[str, str]:
    return {row["id"]: row["status"] for row in ending.rows}


def test_every_item_is_rendered_and_the_worker_released() -> None:
    ending, pool, log = drive([item(i) for i in range(3)], succeeds)
    assert set(statuses(ending).values()) == {"rendered"} and len(ending.rows) == 3
    assert pool.stopped and not pool.abandoned
    assert len(ending.entries) == len(log.entries) == 3
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
        return WorkerGone("cpu-0: exit code 9", work, 0) if work.request.id == "row-0" else succeeds(work)

    ending, _, log = drive([item(0), item(1)], script)
    assert statuses(ending) == {"row-0": "failed", "row-1": "rendered"}
    (failed,) = [row for row in ending.rows if row["status"] == "failed"]
    assert (failed["attempts"], failed["error_class"]) == (2, "WorkerLost")
    assert failed["error_message"] == "killed 2 workers: cpu-0: exit code 9"
    assert log.events.count("worker_lost") == 2


def test_a_worker_lost_after_its_commit_has_rendered_its_item() -> None:
    def record_of(work: WorkItem) -> dict[str, Any]:
        return commit_record(rendered(work), (), FACTS)

    ending, pool, _ = drive([item(0)], lambda work: WorkerGone("killed", work, 0), committed=record_of)
    (row,) = ending.rows
    expected = rendered_row(rendered(item(0)), FACTS)
    assert {name: row[name] for name in expected} == expected
    assert len(pool.submitted) == 1 and ending.rendered_attempts == {"row-0": 1}
