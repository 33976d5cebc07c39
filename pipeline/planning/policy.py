"""What follows a failure, as tables: for the row, for the job, and whether one more clip may start.

Pure: the caller supplies the time and applies the decision. The class of a failure decides, never its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from pipeline.errors import StorageUnavailable
from pipeline.records.work import MEMORY_RUNGS, MORE_GPUS, WorkItem


class AfterFailure(Enum):
    """What becomes of a row whose attempt failed; the value is what the event log says."""

    RETRY = "retry"
    # On the next rung of MEMORY_RUNGS.
    NEXT_RUNG = "retry with less memory"
    # Back to its place as if nothing had been tried: what happened says nothing about the row.
    TAKE_BACK = "take back"
    SET_ASIDE = "set aside"
    STOP_JOB = "stop the job"


# Failures of all classes together after which a row is set aside: one that fails in another way each time.
MAX_FAILURES_OF_A_ROW = 5
# Failure class (`errors.FAULTS`) -> what follows, and after how many failures of that class the row is set aside.
_TABLE: dict[str, tuple[AfterFailure, int]] = {
    "InvalidRequest": (AfterFailure.SET_ASIDE, 1),
    # The ladder ends by itself: with its last rung, or with the widest layout.
    "OutOfMemory": (AfterFailure.NEXT_RUNG, MAX_FAILURES_OF_A_ROW),
    "EngineFault": (AfterFailure.RETRY, 2),
    # The worker has backed off in place for long before it says so.
    "StorageUnavailable": (AfterFailure.RETRY, 2),
    "StorageFull": (AfterFailure.STOP_JOB, 1),
    "UsageError": (AfterFailure.STOP_JOB, 1),
    # An item that ends two workers would end them all.
    "WorkerLost": (AfterFailure.RETRY, 2),
    "Hang": (AfterFailure.RETRY, 2),
    "Preempted": (AfterFailure.TAKE_BACK, 0),
    "Cancelled": (AfterFailure.TAKE_BACK, 0),
}
# A sign of life comes with every step; so much longer than predicted, nothing comes any more.
HANG_FACTOR = 5.0
# An attempt is a straggler once it has taken so much longer than predicted, and long enough for that to mean something.
STRAGGLER_FACTOR = 2.0
STRAGGLER_AT_LEAST_S = 10.0


@dataclass
class RowFailures:
    """How often each row failed, by class. Attempts that were taken back do not count."""

    _by_id: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, id: str, fault: str) -> int:
        """Note one more failure of the row; returns how many of this class there are."""
        failures = self._by_id.setdefault(id, Counter())
        failures[fault] += 1
        return failures[fault]

    def num(self, id: str, fault: str) -> int:
        return self._by_id.get(id, Counter())[fault]

    def total(self, id: str) -> int:
        return sum(self._by_id.get(id, Counter()).values())


def after_failure(fault: str, item: WorkItem, failures: RowFailures) -> AfterFailure:
    """What follows when an attempt at `item` failed with `fault`, a name of `errors.FAULTS`; notes the failure."""
    decision, max_failures = _TABLE[fault]
    if decision is AfterFailure.TAKE_BACK:
        return decision
    num_failures = failures.count(item.request.id, fault)
    if decision is AfterFailure.NEXT_RUNG and on_next_rung(item) is None:
        return AfterFailure.SET_ASIDE
    if decision is not AfterFailure.STOP_JOB and (
        num_failures >= max_failures or failures.total(item.request.id) >= MAX_FAILURES_OF_A_ROW
    ):
        # The store is the job's, not the row's: if it stays away no other row can be written either.
        return AfterFailure.STOP_JOB if fault == StorageUnavailable.__name__ else AfterFailure.SET_ASIDE
    return decision


def is_nobodys(fault: str) -> bool:
    """If a failure of this class says nothing of the row, nor of the job."""
    return _TABLE[fault][0] is AfterFailure.TAKE_BACK


def on_next_rung(item: WorkItem) -> WorkItem | None:
    """`item` on the rung after its own; None after the last. More GPUs than it had can be had more than once."""
    index = min(MEMORY_RUNGS.index(item.memory_rung) + 1, len(MEMORY_RUNGS) - 1)
    rung = MEMORY_RUNGS[index]
    if rung != MORE_GPUS:
        return replace(item, memory_rung=rung)
    wider = [offer.layout.num_gpus for offer in item.offers if offer.layout.num_gpus > item.layout.num_gpus]
    return replace(item, memory_rung=rung, min_gpus=wider[0]) if wider else None


def retried(item: WorkItem, decision: AfterFailure) -> WorkItem:
    """`item` as it goes back to the queue after `decision`."""
    if decision is AfterFailure.NEXT_RUNG:
        return on_next_rung(item) or item
    return item if decision is AfterFailure.TAKE_BACK else replace(item, alone=True)


@dataclass
class CrashLoop:
    """Tells bad luck from a job that cannot go on: workers that are lost while no item ends in between.

    One row that ends every worker is set aside after two; `num_workers` may go at once with their machine. While some
    worker is at work, others that cannot start do not end the job. Clips of one form that all end their workers say
    nothing of the other forms, until very many have.
    """

    num_workers: int
    _lost_idle: int = 0
    # Rows that were lost with their workers, and the forms among them.
    _lost_rows: set[str] = field(default_factory=set)
    _lost_forms: set[Hashable] = field(default_factory=set)

    def item_ended(self) -> None:
        self._lost_idle = 0
        self._lost_rows.clear()
        self._lost_forms.clear()

    def worker_lost(self, held: Sequence[WorkItem], cause: str, *, num_busy: int, num_forms: int) -> str | None:
        """Note a worker that was lost with the items `held`, while `num_busy` others are at work and items of
        `num_forms` are left; why the job must end, or None."""
        if held:
            self._lost_rows.update(item.request.id for item in held)
            self._lost_forms.update(item.request.form for item in held)
        else:
            self._lost_idle += 1
        most = max(4, self.num_workers)
        if self._lost_idle >= most and num_busy == 0:
            return (
                f"{self._lost_idle} workers were lost while they started or waited, and no clip ended in between; the "
                f"last: {cause}; see the workers' logs, then run the same command again"
            )
        is_telling = len(self._lost_forms) > 1 or num_forms <= 1 or len(self._lost_rows) >= 20 * most
        if len(self._lost_rows) >= 2 * most and is_telling:
            return (
                f"workers were lost with each of {len(self._lost_rows)} rows, and no clip ended in between; the last: "
                f"{cause}; see the workers' logs, then run the same command again"
            )
        return None


def silence_limit_s(longest_step_s: float, at_least_s: float) -> float:
    """How long a worker may give no sign of life, for an item whose longest step is predicted to take so long."""
    return max(at_least_s, HANG_FACTOR * longest_step_s)


def is_straggler(elapsed_s: float, predicted_s: float, at_least_s: float = STRAGGLER_AT_LEAST_S) -> bool:
    """If an idle worker should try the row of an attempt that has run for `elapsed_s` too.

    At twice the prediction the rival ends first, if the attempt has as far to go as it has come.
    """
    return elapsed_s > max(at_least_s, STRAGGLER_FACTOR * predicted_s)


@dataclass(frozen=True)
class Admission:
    """Limits of a whole job. None means no limit. `deadline_ns` is UTC nanoseconds."""

    budget_usd: float | None = None
    deadline_ns: int | None = None
    max_failed_rows: int | None = None

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

    def is_over(self, now_ns: int) -> bool:
        """If the deadline has passed: what is still in flight goes back."""
        return self.deadline_ns is not None and now_ns >= self.deadline_ns

    def too_many_failed(self, num_failed: int) -> str | None:
        """Why the job must end after `num_failed` rows were set aside, or None."""
        if self.max_failed_rows is None or num_failed <= self.max_failed_rows:
            return None
        return f"{num_failed} rows failed, more than max_failed_rows={self.max_failed_rows} allows"
