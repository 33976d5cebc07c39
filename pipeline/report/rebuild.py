"""From a run's folder to its report: summary, text and page, at any time, also of a run that still goes or died.

A run that ended has its results table; for one that did not, rows come from its event log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.report.page import Showcase, render_page
from pipeline.report.summary import STATUSES, RunSummary, as_text, summarise
from pipeline.storage.runs import is_running, read_events, read_run
from pipeline.storage.store import Store
from pipeline.storage.tables import RESULTS_SCHEMA, iter_rows, read_rows

# What summary and page look at.
_LEDGER_COLUMNS = ("gpu_id", "state", "id", "attempt", "t0_ns", "t1_ns", "gpu_seconds", "energy_j", "cost_usd")


@dataclass(frozen=True)
class Rebuilt:
    """A report as it was just written."""

    run: dict[str, Any]
    summary: RunSummary
    text: str
    page: str


def rebuild(store: Store, run_id: str) -> Rebuilt:
    """Read a run's tables and write its `report.html`; UsageError if there is no such run."""
    run = read_current(store, run_id)
    ledger = read_rows(store, f"runs/{run_id}/ledger", columns=_LEDGER_COLUMNS)
    # A run that was killed, or failed, while it wrote its results has some parts of them.
    has_results = _is_closed(run) and any(name.endswith(".parquet") for name in store.sizes(f"runs/{run_id}/results"))
    results: Iterable[dict[str, Any]]
    if has_results:
        results = iter_rows(store, f"runs/{run_id}/results", columns=RESULTS_SCHEMA.names)
    else:
        results = _rows_from_events(store, run_id)
    showcase = Showcase()
    summary = summarise(showcase.noting(results), ledger, run)
    if not has_results:
        summary = replace(summary, status_counts=_with_planned(Counter(summary.status_counts), run))
    page = render_page(run, summary, showcase.clips(), ledger, output_uri=store.root_uri)
    store.write(f"runs/{run_id}/report.html", page.encode())
    return Rebuilt(run, summary, as_text(summary), store.shown(f"runs/{run_id}/report.html"))


def read_current(store: Store, run_id: str) -> dict[str, Any]:
    """`run.json`; a run whose driver died without a word is `lost`, though its file still says `running`."""
    run = read_run(store, run_id)
    if run["state"] == "running" and not is_running(store, run_id, time.time_ns()):
        run["state"] = "lost"
    return run


def _rows_from_events(store: Store, run_id: str) -> list[dict[str, Any]]:
    rows = [event["row"] for event in read_events(store, run_id) if isinstance(event.get("row"), dict)]
    return sorted(rows, key=lambda row: row["row_index"])


def _is_closed(run: dict[str, Any]) -> bool:
    """If the run came to its end by itself: its totals are final, which is said after its last row was written."""
    return "not_started" in run["totals"]


def _with_planned(counts: Counter[str], run: dict[str, Any]) -> dict[str, int]:
    """Rows by status of a run without results: what happened since, and what was known when it started."""
    totals = run["totals"]
    if not _is_closed(run):
        counts["skipped"] += totals["skipped"]
        counts["not_started"] = totals["rows"] - counts.total()
    return {status: counts[status] for status in STATUSES}


def progress_line(store: Store, run_id: str) -> tuple[str, bool]:
    """How a run is going, in a line, and whether it still goes."""
    run = read_current(store, run_id)
    counts = _with_planned(Counter(row["status"] for row in _rows_from_events(store, run_id)), run)
    parts = [f"{run['state']}: {run['totals']['rows']} rows"]
    parts += [f"{status} {number}" for status, number in counts.items() if number]
    return "  ".join(parts), run["state"] == "running"
