"""The ranks of one worker as the driver sees them: who they are, what they have in hand, and when they are lost.

Decides and remembers; it calls no actor and knows no Ray. The pool asks the actors and passes on what they answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.agreement import FOLLOW_S, SIBLING_S, Agreement, InHand
from pipeline.cluster.assignment import Beat
from pipeline.cluster.pool import Held
from pipeline.cluster.rank_ledger import RankLedger
from pipeline.cluster.rank_report import Hello, Report, Sign
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.errors import Hang, PipelineError, Preempted, WorkerLost
from pipeline.planning.policy import silence_limit_s
from pipeline.records.gang import Member
from pipeline.records.outcome import Outcome, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem

# How long an actor's `poll` waits for news, at least: in a small pool the ledger's running entries are at most so old.
POLL_S = 0.25
NUM_PINGS = 3
# A node that is drained is left so long before it goes: its workers' last reports must still get out.
LAST_MOMENT_S = 2.0


@dataclass(frozen=True)
class Loss:
    """Why a worker is given up. With `error`, that is what one of its ranks met before the worker was ready."""

    cause: str
    fault: str = WorkerLost.__name__
    error: BaseException | None = None


@dataclass
class Rank:
    """One process of a worker."""

    index: int
    gpu_id: str
    actor: Any
    hello: Hello | None = None
    pinged_ns: int = 0
    pings: list[tuple[int, int]] = field(default_factory=list)
    ledger: RankLedger | None = None
    # Its process builds, or has, its worker: from then on it reports.
    has_begun: bool = False
    is_ready: bool = False
    is_free: bool = False
    num_taken: int = 0
    signs: tuple[Sign, ...] = ()
    # When its answer is due at the latest, by the monotonic clock; None while nothing is asked.
    due_s: float | None = None
    # If its last report was asked for.
    is_awaited: bool = False

    @property
    def offset_ns(self) -> int:
        """The driver's clock minus the rank's, from the shortest of a few round trips."""
        return min(self.pings)[1]

    def sign_of(self, item: WorkItem) -> Sign | None:
        return next((sign for sign in self.signs if item.is_attempt(sign.key, sign.attempt)), None)


class WorkerGroup:
    """A worker of `layout`, with a rank for each of its GPUs, at `place`, asked for at `asked_s`. Times in seconds are
    monotonic."""

    def __init__(
        self,
        group_id: str,
        layout: ParallelLayout,
        ranks: list[Rank],
        place: Any,
        plan: WorkerPlan,
        asked_s: float,
    ) -> None:
        self.group_id = group_id
        self.layout = layout
        self.ranks = ranks
        self.place = place
        self.asked_s = asked_s
        self.placed_s = asked_s
        self._ready_s: float | None = None
        self._idle_since_s = asked_s
        # When its node goes, if that is known; `is_draining` without it: some time.
        self.is_draining = False
        self.drained_at_s: float | None = None
        self.is_leaving = self.is_ended = False
        self.leave_by_s = 0.0
        self.agreement = Agreement(len(ranks))
        self._plan = plan
        self._num_handed_in = 0
        # Its ranks were asked to build their worker.
        self.has_begun = False
        self._setup_error: tuple[BaseException, float] | None = None
        self._lost_by_error: str | None = None
        # Waits until nothing else is in the worker's hands.
        self._waiting: tuple[WorkItem, int] | None = None

    @property
    def is_placed(self) -> bool:
        return any(rank.hello is not None for rank in self.ranks)

    @property
    def node_id(self) -> str | None:
        """Ray's id of the node it is on; None until that is known."""
        return next((rank.hello.ray_node_id for rank in self.ranks if rank.hello is not None), None)

    @property
    def is_ready(self) -> bool:
        return all(rank.is_ready for rank in self.ranks)

    @property
    def is_free(self) -> bool:
        """If it can take an item. Until a rank has heard of the last one, what it says of itself is old."""
        if not self.is_ready or self.is_draining or self.is_leaving or self._waiting is not None:
            return False
        return self.agreement.is_at_one and not self._busy_ranks()

    @property
    def is_saying_farewell(self) -> bool:
        """If a rank was asked for its last report, and that or the one before is outstanding."""
        if self.is_ended:
            return False
        return any(rank.is_awaited or (self.has_begun and rank.due_s is not None) for rank in self.ranks)

    @property
    def ready_after_s(self) -> float:
        """Seconds from its place to its worker; 0 before."""
        return 0.0 if self._ready_s is None else self._ready_s - self.placed_s

    def is_spare(self, now_s: float) -> bool:
        """If it would not be missed: it waits for a place, or it has been idle for as long as its start took."""
        if not self.is_placed:
            return True
        return self.is_idle and now_s - self._idle_since_s >= self.ready_after_s

    @property
    def is_idle(self) -> bool:
        """If nothing would be lost with it but its start."""
        return not self.is_placed or (self.is_free and self.holds_nothing)

    @property
    def holds_nothing(self) -> bool:
        return not self.agreement.held and self._waiting is None

    def held(self) -> tuple[Held, ...]:
        """What is in its hands. Only what was there alone is a suspect."""
        entries = [*self.agreement.held, *([InHand(*self._waiting)] if self._waiting else [])]
        is_suspect = len(entries) == 1 and self.agreement.quarrel is None
        return tuple(Held(entry.item, entry.since_ns, is_suspect) for entry in entries)

    def seat_of(self, rank: Rank) -> WorkerSeat:
        """The seat of a rank whose clock was compared."""
        assert rank.hello is not None, "it has answered pings"
        return WorkerSeat(
            run_id=self._plan.run_id,
            gpu_id=rank.gpu_id,
            node_id=rank.hello.node_name,
            group_id=self.group_id,
            rank=rank.index,
            acquired_ns=rank.hello.born_ns + rank.offset_ns,
        )

    def member(self, rank: Rank) -> Member:
        leader = self.ranks[0].hello
        assert leader is not None, "every rank has said who it is"
        return Member(rank.index, len(self.ranks), port=leader.port, layout=self.layout)

    def take(self, item: WorkItem, now_ns: int) -> bool:
        """The item is in its hands from now on. False if it must wait, because it is to be alone."""
        if item.alone and self.agreement.held:
            self._waiting = (item, now_ns)
            return False
        self._num_handed_in += 1
        self.agreement.hand_in(item, now_ns)
        return True

    def withdraw(self, item: WorkItem | None = None) -> Held | None:
        """Give back the item that waits to be alone; with `item`, only if that is the one. Its ranks never had it."""
        if self._waiting is None:
            return None
        waiting = InHand(*self._waiting)
        if item is not None and not waiting.is_of(item):
            return None
        self._waiting = None
        return Held(waiting.item, waiting.since_ns, is_suspect=False)

    def next_waiting(self) -> WorkItem | None:
        """The item that waited to be alone, once it can start; it is in the worker's hands from now on."""
        if self._waiting is None or self.agreement.held or not self.agreement.is_at_one or self._busy_ranks():
            return None
        (item, since_ns), self._waiting = self._waiting, None
        self.take(item, since_ns)
        return item

    def hear(self, rank: Rank, report: Report, now_s: float) -> None:
        was_ready = self.is_ready
        rank.is_ready, rank.is_free, rank.num_taken = report.is_ready, report.is_free, report.num_taken
        rank.signs = report.signs
        for outcome in report.outcomes:
            self.agreement.hear(rank.index, outcome, now_s)
        if report.error is not None and not was_ready:
            self._note_setup_error(report.error, now_s)
        elif report.error is not None:
            self._lost_by_error = f"{self.name_of(rank)}: {type(report.error).__name__}: {_first_line(report.error)}"
        if self.is_ready and not was_ready:
            self._ready_s = self._idle_since_s = now_s

    def _note_setup_error(self, error: BaseException, now_s: float) -> None:
        """The first one counts, but for what its siblings meet when a rank gives up: that says nothing of the cause."""
        if self._setup_error is None:
            self._setup_error = (error, now_s)
        elif isinstance(error, PipelineError) and not isinstance(self._setup_error[0], PipelineError):
            self._setup_error = (error, self._setup_error[1])

    def conclude(self, now_s: float) -> list[Outcome]:
        """The items it has ended, each with what became of it."""
        outcomes = self.agreement.conclude(now_s, leader_is_free=not self._is_busy(self.ranks[0]))
        if outcomes:
            self._idle_since_s = now_s
        return outcomes

    def loss(self, now_s: float) -> Loss | None:
        """If it is lost, why."""
        if self._setup_error is not None and (len(self.ranks) == 1 or now_s - self._setup_error[1] > SIBLING_S):
            error = self._setup_error[0]
            return Loss(f"{self.group_id}: {type(error).__name__}: {_first_line(error)}", error=error)
        if self.is_draining and self.drained_at_s is not None and now_s > self.drained_at_s - LAST_MOMENT_S:
            return Loss(f"{self.group_id}: its node is being taken away", Preempted.__name__)
        cause = self._lost_by_error or self._quarrel(now_s)
        return Loss(cause) if cause is not None else self._hang(now_s)

    def _quarrel(self, now_s: float) -> str | None:
        cause = self.agreement.quarrel
        for rank in self._busy_ranks():
            patience_s = FOLLOW_S if rank.index else self._plan.hang_after_s
            cause = cause or self.agreement.still_at_it(rank.index, now_s, patience_s)
        return cause and f"{self.group_id}: {cause}"

    def _hang(self, now_s: float) -> Loss | None:
        patience_s, load_s = self._plan.hang_after_s, self._plan.load_timeout_s
        for rank in self.ranks:
            if rank.due_s is not None and now_s > rank.due_s + patience_s:
                return self._hung(rank, f"has not answered for {patience_s:g} s{self._where(rank)}")
        if not self.is_ready and self.is_placed and now_s - self.placed_s > load_s:
            late = next(rank for rank in self.ranks if not rank.is_ready)
            return self._hung(late, f"was not loaded within {load_s:g} s")
        for entry in self.agreement.held:
            limit_s = silence_limit_s(entry.item.estimate.longest_step_s, patience_s)
            signs = [(rank, sign) for rank in self.ranks if (sign := rank.sign_of(entry.item)) is not None]
            if any(sign.silent_s > limit_s for _, sign in signs):
                # The others wait for the one that is least far; or for one that does not even answer.
                rank, _ = min(signs, key=lambda of: (not self._is_overdue(of[0], now_s), of[1].beat.count))
                return self._hung(rank, f"gave no sign of life for {limit_s:g} s{_where_in(rank, entry.item)}")
        return None

    def _hung(self, rank: Rank, how: str) -> Loss:
        return Loss(f"{self.name_of(rank)} {how}", Hang.__name__)

    def _where(self, rank: Rank) -> str:
        """Where the rank was when it was last heard of."""
        where = (_where_in(rank, entry.item) for entry in reversed(self.agreement.held))
        return next((found for found in where if found), "" if self.is_ready else " while it loaded")

    def name_of(self, rank: Rank) -> str:
        return f"{rank.gpu_id} (rank {rank.index} of {self.group_id})"

    def _busy_ranks(self) -> list[Rank]:
        return [rank for rank in self.ranks if self._is_busy(rank)]

    def _is_busy(self, rank: Rank) -> bool:
        return not rank.is_free or rank.num_taken != self._num_handed_in

    @staticmethod
    def _is_overdue(rank: Rank, now_s: float) -> bool:
        return rank.due_s is not None and now_s > rank.due_s + POLL_S


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _where_in(rank: Rank, item: WorkItem) -> str:
    sign = rank.sign_of(item)
    return "" if sign is None else f' after {_step(sign.beat)} of row "{item.request.id}"'


def _step(beat: Beat) -> str:
    if not beat.count:
        return "the start"
    return f"step {beat.step} of {beat.num_steps} of {beat.stage}" if beat.num_steps else beat.stage
