"""Closing the books of a run: its results rows in the order of the manifest, their costs, its totals and exit code.

Values in, values out: what was planned and how the loop ended. Nothing is written here (`driver_side.Run`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.cluster.ending import Ending
from pipeline.cost.allocation import Allocation
from pipeline.planning.plan import Plan
from pipeline.records.outcome import NS_PER_S, RunFacts, item_row, rejected_row, skipped_row

_STATUSES = ("rendered", "skipped", "rejected", "failed", "not_started")


def results_rows(plan: Plan, ending: Ending, facts: RunFacts) -> Iterator[dict[str, Any]]:
    """Every results row in the order of the manifest, each made when it is asked for: all at once are gigabytes."""
    left_out = (
        rejected_row(rejection.row, rejection.row_index, rejection.message, facts) | {"status": "not_started"}
        for rejection in plan.left_out_rejected
    )
    return heapq.merge(
        (skipped_row(item, plan.records[item.key], facts) for item in plan.done),
        (item_row(item, facts, status="not_started") for item in plan.left_out),
        rejected_rows(plan, facts),
        left_out,
        sorted(ending.rows, key=_place),
        key=_place,
    )


def rejected_rows(plan: Plan, facts: RunFacts) -> Iterator[dict[str, Any]]:
    return (rejected_row(each.row, each.row_index, each.message, facts) for each in plan.rejected)


def _place(row: dict[str, Any]) -> int:
    return int(row["row_index"])


def charge(ending: Ending, allocation: Allocation) -> None:
    """Fill the cost columns of the rows that used a worker."""
    for row in ending.rows:
        cost = allocation.rows.get(row["id"]) if row["attempts"] else None
        if cost is not None:
            row["gpu_seconds"] = cost.gpu_seconds
            row["cost_usd"] = float(cost.direct if row["id"] in ending.rendered_attempts else cost.waste)
            row["cost_loaded_usd"] = float(cost.loaded)


def count_statuses(plan: Plan, ending: Ending) -> Counter[str]:
    """How many rows of the manifest have which status."""
    num_left_out = len(plan.left_out) + len(plan.left_out_rejected)
    planned = Counter(skipped=len(plan.done), rejected=len(plan.rejected), not_started=num_left_out)
    return planned + Counter(row["status"] for row in ending.rows)


def totals(statuses: Counter[str], ending: Ending, allocation: Allocation, wall_s: float) -> dict[str, Any]:
    """What `run.json` says of the whole run."""
    return {
        "rows": statuses.total(),
        **{status: statuses[status] for status in _STATUSES},
        "wall_s": wall_s,
        "gpu_seconds": allocation.gpu_ns / NS_PER_S,
        "cost_usd": float(allocation.total),
        "cost_unallocated_usd": float(allocation.unallocated),
        "cost_by_state_usd": {state: float(cost) for state, cost in sorted(allocation.by_state.items())},
        "cost_wasted_by_cause_usd": {cause: float(cost) for cause, cost in sorted(allocation.wasted.items())},
        "video_seconds": sum(row["duration_s"] for row in ending.rows if row["status"] == "rendered"),
    }


def exit_code(statuses: Counter[str], ending: Ending) -> int:
    """README, "The contract"."""
    if ending.stopped_by is not None:
        return ending.stopped_by.exit_code
    if ending.limit_reached is not None:
        return 4
    return 3 if statuses["rejected"] or statuses["failed"] else 0
