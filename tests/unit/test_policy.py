"""What follows a failure, and when no more work may start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.errors import (
    FAULTS,
    CheckpointMismatch,
    EngineFault,
    InvalidRequest,
    OutOfMemory,
    StorageFull,
    fault_of,
)
from pipeline.planning.policy import (
    MAX_FAILURES_OF_A_ROW,
    Admission,
    AfterFailure,
    CrashLoop,
    RowFailures,
    after_failure,
    retried,
    silence_limit_s,
)
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import MEMORY_RUNGS, Estimate, Offer
from tests.unit.makers import item

RETRY, ASIDE, STOP = AfterFailure.RETRY, AfterFailure.SET_ASIDE, AfterFailure.STOP_JOB
RUNG, BACK = AfterFailure.NEXT_RUNG, AfterFailure.TAKE_BACK


def decisions_of(*faults: str) -> list[AfterFailure]:
    """What follows when a row fails in these ways, one after the other."""
    failures, work, decisions = RowFailures(), item(), []
    for fault in faults:
        decisions.append(after_failure(fault, work, failures))
        work = retried(work, decisions[-1])
    return decisions


@pytest.mark.parametrize(
    ("fault", "decisions"),
    [
        ("InvalidRequest", [ASIDE]),
        ("OutOfMemory", [RUNG, RUNG, ASIDE]),
        ("EngineFault", [RETRY, ASIDE]),
        ("StorageUnavailable", [RETRY, STOP]),
        ("StorageFull", [STOP]),
        ("UsageError", [STOP]),
        ("WorkerLost", [RETRY, ASIDE]),
        ("Hang", [RETRY, ASIDE]),
        ("Preempted", [BACK] * 9),
        ("Cancelled", [BACK] * 9),
    ],
)
def test_the_class_of_a_failure_decides(fault: str, decisions: list[AfterFailure]) -> None:
    assert decisions_of(*[fault] * len(decisions)) == decisions


def test_every_fault_has_a_decision() -> None:
    assert all(decisions_of(cls.__name__) for cls in FAULTS)


def test_failures_of_one_class_do_not_use_up_the_tries_of_another() -> None:
    assert decisions_of("WorkerLost", "EngineFault", "OutOfMemory") == [RETRY, RETRY, RUNG]


def test_a_row_that_fails_in_another_way_each_time_is_set_aside_in_the_end() -> None:
    faults = ["WorkerLost", "EngineFault", "OutOfMemory", "OutOfMemory", "Hang"]
    assert len(faults) == MAX_FAILURES_OF_A_ROW and decisions_of(*faults)[-1] is ASIDE
    assert decisions_of(*faults[:-1])[-1] is RUNG


def test_what_was_taken_back_does_not_count_as_a_failure() -> None:
    assert decisions_of("Preempted", "WorkerLost", "Preempted", "WorkerLost") == [BACK, RETRY, BACK, ASIDE]


def test_a_clip_that_does_not_fit_goes_down_the_rungs_and_keeps_the_rung() -> None:
    work = retried(item(), RUNG)
    assert work.memory_rung == MEMORY_RUNGS[1] and not work.alone
    again = retried(work, RETRY)
    assert again.memory_rung == MEMORY_RUNGS[1] and again.alone


def test_who_may_have_ended_a_worker_is_tried_alone_next() -> None:
    assert retried(item(), RETRY).alone and not retried(item(), BACK).alone


def test_a_crash_loop_is_told_from_a_poison_row_and_from_a_machine_that_goes() -> None:
    loop = CrashLoop(num_workers=8)
    still = {"num_busy": 0, "num_forms": 3}
    assert not any(loop.worker_lost([], "its machine went", **still) for _ in range(7))
    loop.item_ended()
    assert not any(loop.worker_lost([item(0)], "segfault", **still) for _ in range(50))
    assert [bool(loop.worker_lost([], "driver mismatch", **still)) for _ in range(8)] == [False] * 7 + [True]


def test_workers_that_cannot_start_do_not_end_a_job_on_which_others_work() -> None:
    loop = CrashLoop(num_workers=8)
    assert not any(loop.worker_lost([], "bad GPU", num_busy=7, num_forms=1) for _ in range(100))


def test_clips_of_one_form_that_end_their_workers_say_nothing_of_other_forms() -> None:
    loop, left = CrashLoop(num_workers=1), {"num_busy": 0, "num_forms": 2}
    assert not any(loop.worker_lost([item(n)], "killed for its memory", **left) for n in range(30))
    assert loop.worker_lost([item(99, width=320)], "killed for its memory", **left) is not None


def test_a_job_in_which_every_row_ends_its_worker_ends_itself_and_names_the_cause() -> None:
    loop = CrashLoop(num_workers=2)
    reasons = [loop.worker_lost([item(n)], "CUDA driver mismatch", num_busy=1, num_forms=1) for n in range(8)]
    assert reasons[:-1] == [None] * 7 and "CUDA driver mismatch" in (reasons[-1] or "")


def test_silence_is_a_hang_after_a_minute_or_five_steps() -> None:
    assert (silence_limit_s(2.0, 60.0), silence_limit_s(30.0, 60.0)) == (60.0, 150.0)


def test_the_deadline_ends_what_is_in_flight_too() -> None:
    admission = Admission(deadline_ns=10)
    assert (admission.is_over(9), admission.is_over(10), Admission().is_over(10)) == (False, True, False)


def test_so_many_failed_rows_end_the_job() -> None:
    admission = Admission(max_failed_rows=2)
    assert admission.too_many_failed(2) is None and "max_failed_rows=2" in (admission.too_many_failed(3) or "")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ZeroDivisionError("a bug"), "EngineFault"),
        (MemoryError(), "OutOfMemory"),
        (CheckpointMismatch("x"), "UsageError"),
        (InvalidRequest(("x",)), "InvalidRequest"),
        (EngineFault("x"), "EngineFault"),
        (OutOfMemory("x"), "OutOfMemory"),
        (StorageFull("x"), "StorageFull"),
    ],
)
def test_any_error_counts_as_one_of_the_faults(error: BaseException, fault: str) -> None:
    assert fault_of(error) == fault


def refusal(admission: Admission, **changes: float) -> str | None:
    facts = {"spent_usd": 1.0, "in_flight_usd": 0.5, "next_usd": 0.4, "next_s": 10.0, **changes}
    return admission.refusal(**facts, now_ns=1_000_000_000)  # type: ignore[arg-type]


def test_a_budget_counts_what_is_spent_in_flight_and_next() -> None:
    assert refusal(Admission(budget_usd=1.9)) is None
    assert "budget_usd is 1.89" in (refusal(Admission(budget_usd=1.89)) or "")


def test_a_deadline_refuses_what_would_end_after_it() -> None:
    assert refusal(Admission(deadline_ns=11_000_000_000)) is None
    assert "deadline" in (refusal(Admission(deadline_ns=10_999_999_999)) or "")


def test_no_limits_refuse_nothing() -> None:
    assert refusal(Admission(), spent_usd=1e9) is None


def test_out_of_memory_on_the_last_rung_is_tried_on_wider_layouts_until_there_is_none() -> None:
    offers = tuple(Offer(ParallelLayout(n), Estimate(1e12, 2.0, 0.01, "uncalibrated", num_gpus=n)) for n in (1, 2, 4))
    work, failures, seen = replace(item(), offers=offers), RowFailures(), []
    while (decision := after_failure("OutOfMemory", work, failures)) is AfterFailure.NEXT_RUNG:
        work = retried(work, decision)
        # It is handed out on the narrowest that it may have.
        work = replace(work, layout=ParallelLayout(work.min_gpus))
        seen.append((work.memory_rung, work.min_gpus))
    assert decision is AfterFailure.SET_ASIDE
    assert seen == [("small_decode_chunks", 1), ("offload", 1), ("more_gpus", 2), ("more_gpus", 4)]
