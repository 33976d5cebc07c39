"""What follows a failure, and when no more work may start."""

from __future__ import annotations

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
from pipeline.planning.policy import Admission, AfterFailure, after_failure

RETRY, ASIDE, STOP = AfterFailure.RETRY, AfterFailure.SET_ASIDE, AfterFailure.STOP_JOB


@pytest.mark.parametrize(
    ("fault", "decisions"),
    [
        ("InvalidRequest", [ASIDE]),
        ("OutOfMemory", [ASIDE]),
        ("EngineFault", [RETRY, ASIDE]),
        ("StorageUnavailable", [RETRY, RETRY, STOP]),
        ("StorageFull", [STOP]),
        ("UsageError", [STOP]),
        ("WorkerLost", [RETRY, ASIDE]),
    ],
)
def test_the_class_of_a_failure_decides(fault: str, decisions: list[AfterFailure]) -> None:
    assert [after_failure(fault, attempt) for attempt in range(1, len(decisions) + 1)] == decisions


def test_every_fault_has_a_decision() -> None:
    assert all(after_failure(cls.__name__, 1) for cls in FAULTS)


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
