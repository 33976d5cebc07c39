"""What became of a gang's items: the leader's answers, unless the ranks' answers show that the gang came apart.

Pure: the caller supplies the time, in seconds of a clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.errors import Cancelled, EngineFault
from pipeline.records.outcome import Failed, Outcome
from pipeline.records.work import WorkItem

# Ranks leave a step together; one that stays behind for so long waits for a rank that will not come.
FOLLOW_S = 5.0
# What a rank meets when its sibling dies looks like a fault of the engine; the death itself is known within this time.
SIBLING_S = 1.0


@dataclass
class InHand:
    """An item that a gang has, since `since_ns` (UTC), and what its ranks said of it so far, each with the time."""

    item: WorkItem
    since_ns: int
    answer: tuple[Outcome, float] | None = None
    # The rank that failed, with what.
    failed_follower: tuple[int, Failed, float] | None = None

    def is_of(self, item: WorkItem) -> bool:
        return self.item.is_attempt(item.key, item.attempt)


@dataclass
class Agreement:
    """The items in the hands of a gang, oldest first; the device works for the newest."""

    num_ranks: int
    held: list[InHand] = field(default_factory=list)
    # Why the gang cannot go on, once that is known.
    quarrel: str | None = None
    _newest: InHand | None = None
    _newest_ended_s: float | None = None

    def hand_in(self, item: WorkItem, now_ns: int) -> None:
        self._newest, self._newest_ended_s = InHand(item, now_ns), None
        self.held.append(self._newest)

    def hear(self, rank: int, outcome: Outcome, now_s: float) -> None:
        """What a rank says of an item. A follower speaks only of failures."""
        entry = next((entry for entry in (*self.held, self._newest) if entry and entry.is_of(outcome.item)), None)
        if entry is None:
            return
        if rank == 0:
            entry.answer = (outcome, now_s)
            if entry is self._newest:
                self._newest_ended_s = now_s
        elif isinstance(outcome, Failed):
            entry.failed_follower = entry.failed_follower or (rank, outcome, now_s)
            self._compare(entry)

    def conclude(self, now_s: float, *, leader_is_free: bool) -> list[Outcome]:
        """The outcomes that are final now; their items are out of the gang's hands."""
        final: list[Outcome] = []
        for entry in list(self.held):
            outcome = self._final(entry, now_s, leader_is_free)
            if outcome is not None:
                final.append(outcome)
                self.held.remove(entry)
        return final

    def _final(self, entry: InHand, now_s: float, leader_is_free: bool) -> Outcome | None:
        if entry.answer is not None:
            outcome, at_s = entry.answer
            looks_like_a_death = isinstance(outcome, Failed) and outcome.fault == EngineFault.__name__
            if looks_like_a_death and self.num_ranks > 1 and now_s - at_s < SIBLING_S:
                return None
            self._compare(entry)
            return outcome
        if entry.failed_follower is None or leader_is_free or now_s - entry.failed_follower[2] <= FOLLOW_S:
            return None
        rank, failed, _ = entry.failed_follower
        self.quarrel = _alone(rank, failed)
        return failed

    def _compare(self, entry: InHand) -> None:
        """A follower that failed where its leader did not holds who knows what; one that was cancelled is as it was."""
        if entry.failed_follower is None or entry.answer is None or isinstance(entry.answer[0], Failed):
            return
        rank, failed, _ = entry.failed_follower
        if failed.fault != Cancelled.__name__:
            self.quarrel = _alone(rank, failed)

    def still_at_it(self, rank: int, now_s: float, patience_s: float) -> str | None:
        """What is wrong with a busy rank, if the leader ended the newest item so long ago."""
        if self._newest is None or self._newest_ended_s is None or now_s - self._newest_ended_s <= patience_s:
            return None
        return f'rank {rank} was still at row "{self._newest.item.request.id}" {patience_s:g} s after it had been ended'

    @property
    def is_at_one(self) -> bool:
        """If nothing that a rank said speaks against another item."""
        return self.quarrel is None and not any(entry.answer or entry.failed_follower for entry in self.held)


def _alone(rank: int, failed: Failed) -> str:
    return f'rank {rank} failed alone at row "{failed.item.request.id}": {failed.error_class}: {failed.error_message}'
