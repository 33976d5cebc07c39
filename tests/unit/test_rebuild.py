"""A report of a run that did not end goes by its event log, whatever parts of its results are there."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.records.outcome import item_row, rendered_row
from pipeline.report.rebuild import rebuild
from pipeline.storage.local_store import LocalStore
from pipeline.storage.runs import RunFolder
from tests.unit.makers import FACTS, S, item, rendered

PLANNED = {"rows": 3, "skipped": 0, "rejected": 0, "to_render": 3}
FINAL = {"rows": 3, "rendered": 1, "skipped": 0, "rejected": 0, "failed": 0, "not_started": 2}


@pytest.mark.parametrize("state", ["running", "lost", "failed"])
def test_parts_of_results_are_no_finished_table(tmp_path: Path, state: str) -> None:
    folder = opened(tmp_path, state)
    folder.write_results([item_row(item(0), FACTS, status="not_started")], pa.table({"x_a": [0]}))
    counts = rebuild(LocalStore(tmp_path), FACTS.run_id).summary.status_counts
    assert (counts["rendered"], counts["not_started"]) == (1, 2)


def test_results_count_once_the_totals_are_final(tmp_path: Path) -> None:
    folder = opened(tmp_path, "running")
    rows = [rendered_row(rendered(item(0)), FACTS), *(item_row(item(n), FACTS, status="failed") for n in (1, 2))]
    folder.write_results(rows, pa.table({"x_a": [0, 1, 2]}))
    folder.update({"state": "finished", "totals": FINAL})
    counts = rebuild(LocalStore(tmp_path), FACTS.run_id).summary.status_counts
    assert (counts["rendered"], counts["failed"], counts["not_started"]) == (1, 2, 0)


def opened(root: Path, state: str) -> RunFolder:
    folder = RunFolder(LocalStore(root), FACTS.run_id)
    folder.open({"run_id": FACTS.run_id, "state": state, "started_at": "2026-11-20T00:00:00+00:00", "finished_at": None,
                 "model": "nano", "output": root.as_uri(), "totals": PLANNED, "workers": []}, S)  # fmt: skip
    folder.log("rendered", S, id="row-0", row=rendered_row(rendered(item(0)), FACTS))
    return folder
