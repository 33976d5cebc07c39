"""What a run did, counted: statuses, errors, throughput, stage times, cost by state, estimates against actuals.

Pure functions over rows of the `results` and `ledger` tables as plain dicts (the contract's column names). Reads no
file and makes no HTML (`page.py` does). Money is Decimal and is never rounded before it is summed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from pipeline.records.outcome import COLD_START_STATES, IDLE_STATES
from pipeline.report.tally import ErrorGroup, ErrorMessage, EstimateCheck, ResultsTally, Row, StageTime, as_decimal

STATUSES = ("rendered", "skipped", "rejected", "failed", "not_started")
PURPOSES = ("direct", "cold start", "waste", "idle", "unknown")
EXIT_MEANINGS = {
    0: "every row rendered or already there",
    1: "a bug; see the traceback in the log",
    2: "usage or configuration",
    3: "finished, with rows rejected or failed",
    4: "stopped at the budget or the deadline; resumable",
    5: "interrupted; resumable",
    6: "infrastructure gave up",
}
MAX_IDS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Spend:
    """Held time and its price: of a ledger state, a purpose, a tag."""

    name: str
    gpu_seconds: float = 0.0
    energy_j: float = 0.0
    cost_usd: Decimal = Decimal(0)


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """The run's ledger in money. The `*_per_*` figures are of rendered clips: direct alone, and with everything."""

    by_state: tuple[Spend, ...]
    by_purpose: tuple[Spend, ...]
    by_tag: tuple[Spend, ...]
    total: Spend
    direct_per_clip_usd: Decimal | None
    total_per_clip_usd: Decimal | None
    direct_per_video_s_usd: Decimal | None
    total_per_video_s_usd: Decimal | None
    direct_per_megapixel_frame_usd: Decimal | None
    total_per_megapixel_frame_usd: Decimal | None


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Everything the report shows that is not a single clip."""

    run_id: str
    state: str
    exit_code: int | None
    exit_meaning: str
    elapsed_s: float | None
    status_counts: dict[str, int]
    errors: tuple[ErrorGroup, ...]
    video_s: float
    worker_s: float
    clips_per_minute: float | None
    video_s_per_worker_s: float | None
    stages: tuple[StageTime, ...]
    costs: CostTable
    # None until a clip with an estimate is rendered.
    estimate: EstimateCheck | None


def summarise(results: Iterable[Row], ledger: Sequence[Row], run: Row) -> RunSummary:
    """Count a run. `run` is the dict of run.json; results and ledger may still be growing. Reads `results` once."""
    tally = ResultsTally(run["run_id"], last_attempts(ledger))
    for row in results:
        tally.add(row)
    worker_s = math.fsum(row["gpu_seconds"] for row in ledger)
    elapsed_s = _elapsed_s(run, ledger)
    exit_code = run.get("exit_code")
    return RunSummary(
        run_id=run["run_id"],
        state=run["state"],
        exit_code=exit_code,
        exit_meaning=EXIT_MEANINGS.get(exit_code, "") if exit_code is not None else "",
        elapsed_s=elapsed_s,
        status_counts={status: tally.statuses[status] for status in STATUSES},
        errors=tally.errors(),
        video_s=tally.video_s,
        worker_s=worker_s,
        clips_per_minute=tally.statuses["rendered"] / elapsed_s * 60 if elapsed_s else None,
        video_s_per_worker_s=tally.video_s / worker_s if worker_s else None,
        stages=tally.stage_times(),
        costs=cost_table(tally, ledger),
        estimate=tally.estimate_check(),
    )


def cost_table(tally: ResultsTally, ledger: Sequence[Row]) -> CostTable:
    """The ledger summed by state, purpose and tag, and its price per unit of what was rendered."""
    lost = lost_attempts(tally, ledger)
    by_purpose = _spend((purpose_of(row, lost), row) for row in ledger)
    direct = sum((spend.cost_usd for spend in by_purpose if spend.name == "direct"), Decimal(0))
    total = (_spend(("total", row) for row in ledger) or [Spend(name="total")])[0]
    num_rendered, video_s, megapixel_frames = tally.statuses["rendered"], tally.video_s, tally.megapixel_frames
    return CostTable(
        by_state=tuple(_spend((row["state"], row) for row in ledger)),
        by_purpose=tuple(sorted(by_purpose, key=lambda spend: PURPOSES.index(spend.name))),
        by_tag=tuple(_spend((tag, row) for row in ledger for tag in tally.tags.get(row.get("id") or "", ()))),
        total=total,
        direct_per_clip_usd=_per(direct, num_rendered),
        total_per_clip_usd=_per(total.cost_usd, num_rendered),
        direct_per_video_s_usd=_per(direct, video_s),
        total_per_video_s_usd=_per(total.cost_usd, video_s),
        direct_per_megapixel_frame_usd=_per(direct, megapixel_frames),
        total_per_megapixel_frame_usd=_per(total.cost_usd, megapixel_frames),
    )


def lost_attempts(tally: ResultsTally, ledger: Sequence[Row]) -> set[tuple[str, int | None]]:
    """The (id, attempt) pairs that gave no clip: they failed, or another was first."""
    attempts = {(row["id"], row.get("attempt")) for row in ledger if row.get("id")}
    winners = tally.winning_attempts
    return {(id_, attempt) for id_, attempt in attempts if id_ in tally.clipless_ids or attempt != winners[id_]}


def last_attempts(ledger: Sequence[Row]) -> dict[str, int]:
    """The highest attempt of each id that the ledger names."""
    last: dict[str, int] = {}
    for row in ledger:
        if row.get("id"):
            last[row["id"]] = max(last.get(row["id"], 0), row.get("attempt") or 0)
    return last


def purpose_of(entry: Row, lost: set[tuple[str, int | None]]) -> str:
    """What a ledger row was paid for, one of PURPOSES. Waiting inside an attempt belongs to the attempt."""
    if entry["state"] in COLD_START_STATES:
        return "cold start"
    if entry.get("id"):
        return "waste" if (entry["id"], entry.get("attempt")) in lost else "direct"
    if entry["state"] in IDLE_STATES:
        return "idle"
    return "unknown"


def as_text(summary: RunSummary) -> str:
    """The summary as short tables for a terminal, 100 columns wide at most; ends with a newline."""
    code = "" if summary.exit_code is None else f", exit code {summary.exit_code}: {summary.exit_meaning}"
    lines = [f"run {summary.run_id}: {summary.state}{code}"]
    lines.append("rows     " + ", ".join(f"{n} {status}" for status, n in summary.status_counts.items() if n))
    lines += _throughput_lines(summary)
    if summary.stages:
        lines.append(f"{'stage':<14}{'clips':>7}{'total s':>12}{'p50 s':>10}{'p90 s':>10}{'max s':>10}")
        lines += [
            f"{s.name:<14}{s.num_clips:>7}{s.total_s:>12.2f}{s.p50_s:>10.3f}{s.p90_s:>10.3f}{s.max_s:>10.3f}"
            for s in summary.stages
        ]
    costs = summary.costs
    lines.append(f"{'cost':<14}{'worker s':>12}{'USD':>16}")
    lines += [f"{s.name:<14}{s.gpu_seconds:>12.2f}{show_usd(s.cost_usd):>16}" for s in (*costs.by_purpose, costs.total)]
    if costs.total_per_clip_usd is not None:
        lines.append(
            f"per clip {show_usd(costs.direct_per_clip_usd)} direct, {show_usd(costs.total_per_clip_usd)} in all; "
            f"per second of video {show_usd(costs.total_per_video_s_usd)} in all"
        )
    if summary.estimate is not None:
        lines.append(
            f"estimate {summary.estimate.estimated_gpu_seconds:.2f} worker s, actual "
            f"{summary.estimate.actual_gpu_seconds:.2f}; median actual/estimate {summary.estimate.median_ratio:.2f}"
        )
    for group in summary.errors:
        lines.append(f"{group.error_class}: {group.count}")
        lines += [f"  {message.text} [{_some_ids(message)}]" for message in group.messages]
        if group.num_more:
            lines.append(f"  and {group.num_more} rows with other messages; see the results table")
    return "\n".join(lines) + "\n"


def show_usd(amount: Decimal | None) -> str:
    """Money with sensible digits: cents from a dollar up, else three significant ones ($0.000123)."""
    if amount is None:
        return "-"
    if amount == 0:
        return "$0"
    # The size as it will be shown: $0.9999 is $1.00.
    digits = 2 if abs(amount) >= Decimal("0.9995") else 2 - amount.adjusted()
    return f"{'-' if amount < 0 else ''}${abs(amount):,.{digits}f}"


def _throughput_lines(summary: RunSummary) -> list[str]:
    lines: list[str] = []
    if summary.elapsed_s is not None:
        lines.append(f"took     {summary.elapsed_s:.1f} s for {summary.video_s:.2f} s of video")
    if summary.clips_per_minute is not None and summary.video_s_per_worker_s is not None:
        lines.append(
            f"speed    {summary.clips_per_minute:.2f} clips a minute, "
            f"{summary.video_s_per_worker_s:.4f} video seconds a worker second"
        )
    return lines


def _some_ids(message: ErrorMessage) -> str:
    more = message.count - MAX_IDS_SHOWN
    return ", ".join(message.ids[:MAX_IDS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _elapsed_s(run: Row, ledger: Sequence[Row]) -> float | None:
    if run.get("started_at") and run.get("finished_at"):
        started, finished = (datetime.fromisoformat(run[key]) for key in ("started_at", "finished_at"))
        return (finished - started).total_seconds()
    if not ledger:
        return None
    span_ns: int = max(row["t1_ns"] for row in ledger) - min(row["t0_ns"] for row in ledger)
    return span_ns / 1e9


def _spend(named: Iterable[tuple[str, Row]]) -> list[Spend]:
    """Sums by name, the dearest first."""
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for name, row in named:
        rows[name].append(row)
    spends = [
        Spend(
            name=name,
            gpu_seconds=math.fsum(row["gpu_seconds"] for row in group),
            energy_j=math.fsum(row.get("energy_j") or 0.0 for row in group),
            cost_usd=sum((as_decimal(row["cost_usd"]) for row in group), Decimal(0)),
        )
        for name, group in rows.items()
    ]
    return sorted(spends, key=lambda spend: (-spend.cost_usd, -spend.gpu_seconds, spend.name))


def _per(amount: Decimal, units: float) -> Decimal | None:
    return amount / as_decimal(units) if units else None
