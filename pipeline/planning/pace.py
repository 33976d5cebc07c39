"""How long attempts take against what was estimated: what a clip in flight has left, and if it is a straggler.

Pure: the caller supplies the time, in UTC nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.planning.policy import STRAGGLER_AT_LEAST_S, is_straggler
from pipeline.records.work import WorkItem

# So many clips must have ended before what they took says how long the others will take.
MIN_ENDED_TO_PREDICT = 3


@dataclass
class Pace:
    """The attempts in flight since when, and the clips that ended, which scale the estimates of the others."""

    straggler_at_least_s: float = STRAGGLER_AT_LEAST_S
    _since_ns: dict[tuple[str, int], int] = field(default_factory=dict)
    _num_ended: int = 0
    _estimated_s: float = 0.0
    _taken_s: float = 0.0

    def start(self, item: WorkItem, now_ns: int) -> None:
        self._since_ns[_attempt(item)] = now_ns

    def forget(self, item: WorkItem) -> None:
        """The attempt is over, however it ended."""
        self._since_ns.pop(_attempt(item), None)

    def learn(self, item: WorkItem, taken_s: float) -> None:
        """A clip has ended well, and its attempt took so long."""
        self._num_ended += 1
        self._taken_s += taken_s
        self._estimated_s += item.estimate.clip_s

    @property
    def has_open_attempts(self) -> bool:
        return bool(self._since_ns)

    @property
    def scale(self) -> float:
        """Seconds taken for each second estimated."""
        return self._taken_s / self._estimated_s if self._estimated_s > 0 else 1.0

    def predicted_s(self, item: WorkItem) -> float:
        return item.estimate.clip_s * self.scale

    def left_s(self, item: WorkItem, now_ns: int) -> float:
        """How much longer an attempt in flight is predicted to take; 0 for one that is late."""
        return max(0.0, self.predicted_s(item) - self._elapsed_s(item, now_ns))

    def is_late(self, item: WorkItem, now_ns: int) -> bool:
        """If an attempt in flight is a straggler. Never before enough clips have ended to say."""
        if self._num_ended < MIN_ENDED_TO_PREDICT:
            return False
        return is_straggler(self._elapsed_s(item, now_ns), self.predicted_s(item), self.straggler_at_least_s)

    def _elapsed_s(self, item: WorkItem, now_ns: int) -> float:
        return (now_ns - self._since_ns[_attempt(item)]) / 1e9


def _attempt(item: WorkItem) -> tuple[str, int]:
    return item.request.id, item.attempt
