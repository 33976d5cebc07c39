"""One pass over a run's results rows: what a summary needs of them, without holding a million rows.

Numbers that percentiles need are kept as plain doubles; of errors and tags as much as a reader can take in.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import median
from typing import Any

Row = Mapping[str, Any]

STAGES = ("queued", "text_encode", "denoise", "upsample", "decode", "encode", "upload")
# Of an error class, and ids of one message. Each rejected row has a message of its own, which names the row.
MAX_MESSAGES = 50
MAX_IDS = 50


@dataclass(frozen=True, kw_only=True)
class ErrorMessage:
    """One message, how many rows got it, and the ids of the first of them."""

    text: str
    count: int
    ids: tuple[str, ...]

    @property
    def num_more(self) -> int:
        return self.count - len(self.ids)


@dataclass(frozen=True, kw_only=True)
class ErrorGroup:
    """All rows of one error class, with its first distinct messages."""

    error_class: str
    count: int
    messages: tuple[ErrorMessage, ...]

    @property
    def num_more(self) -> int:
        """Rows whose messages are not among `messages`."""
        return self.count - sum(message.count for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds that one stage took over all rendered clips that report it."""

    name: str
    num_clips: int
    total_s: float
    p50_s: float
    p90_s: float
    max_s: float


@dataclass(frozen=True, kw_only=True)
class EstimateCheck:
    """Estimates against actuals, over rendered clips that have both. Ratios are actual / estimated."""

    num_clips: int
    estimated_gpu_seconds: float
    actual_gpu_seconds: float
    estimated_cost_usd: Decimal
    actual_cost_usd: Decimal
    median_ratio: float
    worst_ratio: float


class ResultsTally:
    """What was seen of the rows of run `run_id` so far, to which `last_attempts` (by id) are in its ledger."""

    def __init__(self, run_id: str, last_attempts: Mapping[str, int]) -> None:
        self._run_id = run_id
        self.statuses: Counter[str] = Counter()
        # Rows to which no attempt of this run gave a clip, and of the others the attempt that did; in doubt the last.
        self.clipless_ids: set[str] = set()
        self.winning_attempts = dict(last_attempts)
        # Id -> "name=value" of each tag, of the rows that a ledger can name.
        self.tags: dict[str, tuple[str, ...]] = {}
        self._same_tags: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._pixel_frames = 0
        self._durations_s = array("d")
        self._stages = {stage: array("d") for stage in STAGES}
        self._estimated_s, self._actual_s = array("d"), array("d")
        self._estimated_usd = self._actual_usd = Decimal(0)
        self._error_counts: Counter[str] = Counter()
        self._messages: defaultdict[str, dict[str, _Message]] = defaultdict(dict)

    def add(self, row: Row) -> None:
        status = row["status"]
        self.statuses[status] += 1
        if status in ("rejected", "failed"):
            self._add_error(row)
        if status in ("failed", "not_started") and row.get("attempts"):
            self.clipless_ids.add(row["id"])
        if status == "rendered":
            self._add_rendered(row)
            if row.get("rendered_by_run") not in (None, self._run_id):
                self.clipless_ids.add(row["id"])
            elif row["id"] in self.winning_attempts:
                self.winning_attempts[row["id"]] = row["attempts"]
        if status not in ("skipped", "rejected") and row.get("tags"):
            tags = tuple(f"{name}={value}" for name, value in dict(row["tags"]).items())
            self.tags[row["id"]] = self._same_tags.setdefault(tags, tags)

    def _add_error(self, row: Row) -> None:
        error_class, text = row.get("error_class") or "unnamed", row.get("error_message") or ""
        self._error_counts[error_class] += 1
        messages = self._messages[error_class]
        if text in messages or len(messages) < MAX_MESSAGES:
            messages.setdefault(text, _Message()).add(str(row["id"]))

    def _add_rendered(self, row: Row) -> None:
        self._durations_s.append(row.get("duration_s") or 0.0)
        self._pixel_frames += row["width"] * row["height"] * row["num_frames"]
        for stage, seconds in self._stages.items():
            if row.get(f"{stage}_s") is not None:
                seconds.append(row[f"{stage}_s"])
        if row.get("estimated_gpu_seconds") and row.get("gpu_seconds") is not None:
            self._estimated_s.append(row["estimated_gpu_seconds"])
            self._actual_s.append(row["gpu_seconds"])
            self._estimated_usd += as_decimal(row.get("estimated_cost_usd"))
            self._actual_usd += as_decimal(row.get("cost_usd"))

    @property
    def video_s(self) -> float:
        return math.fsum(self._durations_s)

    @property
    def megapixel_frames(self) -> float:
        return self._pixel_frames / 1e6

    def errors(self) -> tuple[ErrorGroup, ...]:
        """Rejected and failed rows by error class, the most frequent first."""
        groups = [
            ErrorGroup(
                error_class=error_class,
                count=count,
                messages=tuple(
                    ErrorMessage(text=text, count=message.count, ids=tuple(message.ids))
                    for text, message in self._messages[error_class].items()
                ),
            )
            for error_class, count in self._error_counts.items()
        ]
        return tuple(sorted(groups, key=lambda group: (-group.count, group.error_class)))

    def stage_times(self) -> tuple[StageTime, ...]:
        """Total and percentiles of each stage's seconds, in the order in which a clip passes them."""
        return tuple(_stage_time(stage, sorted(seconds)) for stage, seconds in self._stages.items() if seconds)

    def estimate_check(self) -> EstimateCheck | None:
        """What was estimated against what was used; None if no rendered clip has both."""
        if not self._actual_s:
            return None
        ratios = [actual / estimated for actual, estimated in zip(self._actual_s, self._estimated_s, strict=True)]
        return EstimateCheck(
            num_clips=len(ratios),
            estimated_gpu_seconds=math.fsum(self._estimated_s),
            actual_gpu_seconds=math.fsum(self._actual_s),
            estimated_cost_usd=self._estimated_usd,
            actual_cost_usd=self._actual_usd,
            median_ratio=median(ratios),
            worst_ratio=max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf),
        )


class _Message:
    """The rows that got one message."""

    def __init__(self) -> None:
        self.count = 0
        self.ids: list[str] = []

    def add(self, row_id: str) -> None:
        self.count += 1
        if len(self.ids) < MAX_IDS:
            self.ids.append(row_id)


def as_decimal(amount: Decimal | float | None) -> Decimal:
    """An amount of a table as Decimal; none is 0."""
    # Through text: Decimal(0.1) has 55 digits that nobody meant.
    return amount if isinstance(amount, Decimal) else Decimal(str(amount or 0))


def _stage_time(stage: str, seconds: Sequence[float]) -> StageTime:
    return StageTime(
        name=stage,
        num_clips=len(seconds),
        total_s=math.fsum(seconds),
        p50_s=_percentile(seconds, 0.5),
        p90_s=_percentile(seconds, 0.9),
        max_s=seconds[-1],
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of `ordered`, which is sorted and not empty."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
