"""Small makers of the values that unit tests pass around."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from pipeline.records.outcome import ClipAsset, LedgerEntry, Rendered, RunFacts, Timings, WorkerSeat
from pipeline.records.request import RecipeRules, RenderRequest, RequestLimits, parse_request
from pipeline.records.work import Estimate, WorkItem

RULES = RecipeRules("two_stage", 192, 128, 25, 24.0, 64, True)
STRICT = RecipeRules("no_crop", 192, 128, 25, 24.0, 64, False)
RECIPES = {rules.name: rules for rules in (RULES, STRICT)}
LIMITS = RequestLimits(max_side_px=4096, max_duration_s=20.0)
FACTS = RunFacts("run-1", "nano", "f" * 64, "exact")
S = 1_000_000_000


def parse(row_index: int = 0, **row: Any) -> RenderRequest:
    row = {"id": f"row-{row_index}", "prompt": "a boat", **row}
    return parse_request(row, row_index=row_index, recipes=RECIPES, default_recipe="two_stage", limits=LIMITS)


def item(row_index: int = 0, *, key: str | None = None, attempt: int = 1, **row: Any) -> WorkItem:
    estimate = Estimate(1e12, 2.0, 0.01, "uncalibrated")
    return WorkItem(parse(row_index, **row), key or f"{row_index:064d}", estimate, attempt)


def seat(run_id: str = "run-1", acquired_ns: int = 0) -> WorkerSeat:
    return WorkerSeat(run_id, "cpu-0", "node", "group-0", 0, acquired_ns)


def entry(state: str, t0_s: float, t1_s: float, id: str | None = None, attempt: int | None = None) -> LedgerEntry:
    t0_ns, t1_ns = round(t0_s * S), round(t1_s * S)
    cost = Decimal(t1_ns - t0_ns) / S  # a dollar a second keeps the sums readable
    return LedgerEntry("run-1", "cpu-0", "node", "group-0", 0, state, id, attempt, None, t0_ns, t1_ns, "p", cost)


def asset(stem: str = "a") -> ClipAsset:
    return ClipAsset(f"file:///o/videos/{stem}.mp4", f"file:///o/thumbnails/{stem}.jpg", "0" * 64, 10, 192, 128, 25,
                     24.0, 25 / 24, True, 24000)  # fmt: skip


def rendered(work: WorkItem) -> Rendered:
    return Rendered(work, asset(work.request.id), Timings(wall_s=1.0), 0, S, work.request.prompt)
