"""Two decisions, as tables: what follows a failed attempt, and whether one more clip may start.

Pure: the caller supplies the time and applies the decision. The class of a failure decides, never its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pipeline.errors import StorageUnavailable


class AfterFailure(Enum):
    RETRY = "retry"
    SET_ASIDE = "set aside"
    STOP_JOB = "stop the job"


# Failure class (`errors.FAULTS`) -> what follows, and how often a row is tried in all.
_TABLE: dict[str, tuple[AfterFailure, int]] = {
    "InvalidRequest": (AfterFailure.SET_ASIDE, 1),
    "OutOfMemory": (AfterFailure.SET_ASIDE, 1),
    "EngineFault": (AfterFailure.RETRY, 2),
    "StorageUnavailable": (AfterFailure.RETRY, 3),
    "StorageFull": (AfterFailure.STOP_JOB, 1),
    "UsageError": (AfterFailure.STOP_JOB, 1),
    # An item that ends two workers would end them all.
    "WorkerLost": (AfterFailure.RETRY, 2),
}


def after_failure(fault: str, attempt: int) -> AfterFailure:
    """What follows when attempt number `attempt` (from 1) of a row failed with `fault`, a name of `errors.FAULTS`."""
    decision, max_attempts = _TABLE[fault]
    if decision is AfterFailure.RETRY and attempt >= max_attempts:
        # The store is the job's, not the row's: if it stays away no other row can be written either.
        return AfterFailure.STOP_JOB if fault == StorageUnavailable.__name__ else AfterFailure.SET_ASIDE
    return decision


@dataclass(frozen=True)
class Admission:
    """Limits of a whole job. None means no limit. `deadline_ns` is UTC nanoseconds."""

    budget_usd: float | None = None
    deadline_ns: int | None = None

    def refusal(
        self, *, spent_usd: float, in_flight_usd: float, next_usd: float, next_s: float, now_ns: int
    ) -> str | None:
        """Why one more clip may not start, or None. Clips in flight count with their estimates."""
        if self.budget_usd is not None and spent_usd + in_flight_usd + next_usd > self.budget_usd:
            return (
                f"budget_usd is {self.budget_usd:g}: {spent_usd:.6f} spent, {in_flight_usd:.6f} in flight, "
                f"{next_usd:.6f} for the next clip"
            )
        if self.deadline_ns is not None and now_ns + round(next_s * 1e9) > self.deadline_ns:
            return "the deadline would pass before the next clip is done"
        return None
