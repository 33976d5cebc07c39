"""From a run's folder to its report: summary, text and page, at any time, also of a run that still goes or died.

A run that ended has its results table; for one that did not, rows come from its event log.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.report.page import render_page
from pipeline.report.summary import RunSummary, as_text, summarise
from pipeline.storage.filesystem import write_atomically
from pipeline.storage.runs import read_events, read_run
from pipeline.storage.tables import read_ledger, read_rows


@dataclass(frozen=True)
class Rebuilt:
    """A report as it was just written."""

    run: dict[str, Any]
    summary: RunSummary
    text: str


def rebuild(run_folder: Path) -> Rebuilt:
    """Read a run's tables and write its `report.html`; UsageError if `run_folder` is not a run's folder."""
    run = read_run(run_folder)
    results = read_rows(run_folder / "results") or _rows_from_events(run_folder)
    ledger = [asdict(entry) | {"gpu_seconds": entry.gpu_seconds} for entry in read_ledger(run_folder / "ledger")]
    summary = summarise(results, ledger, run)
    page = render_page(run, summary, results, ledger)
    write_atomically(run_folder / "report.html", page.encode())
    return Rebuilt(run, summary, as_text(summary))


def _rows_from_events(run_folder: Path) -> list[dict[str, Any]]:
    rows = [event["row"] for event in read_events(run_folder) if isinstance(event.get("row"), dict)]
    return sorted(rows, key=lambda row: row["row_index"])


def progress_line(run_folder: Path) -> tuple[str, int | None]:
    """How a run is going, in a line, and its exit code once it has one."""
    run = read_run(run_folder)
    counts = Counter(row["status"] for row in _rows_from_events(run_folder))
    parts = [f"{run['state']}: {run['totals'].get('rows', '?')} rows"]
    parts += [f"{status} {number}" for status, number in sorted(counts.items())]
    return "  ".join(parts), run.get("exit_code")
