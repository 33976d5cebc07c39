"""Run folders: claimed once, and closed by whoever comes after a dead driver."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError, WorkerLost
from pipeline.storage import runs
from pipeline.storage.runs import RunFolder, close_dead_runs, read_events, read_run
from pipeline.storage.tables import read_ledger
from tests.unit.makers import S, entry, seat

RUN_FACTS = {"run_id": "run-1", "state": "running", "price_id": "p", "workers": [], "totals": {"rows": 3}}


def opened(output: Path, run_id: str = "run-1", now_s: float = 0) -> RunFolder:
    folder = RunFolder(output, run_id)
    folder.open({**RUN_FACTS, "run_id": run_id}, round(now_s * S))
    return folder


def cost_of(price_id: str, duration_ns: int) -> Decimal:
    return Decimal(duration_ns) / S


def died(output: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with one worker, 4 s of ledger and a last sign of life at 4 s, whose driver is gone."""
    folder = opened(output)
    folder.set_workers([seat()])
    folder.write_ledger([entry("weight_load", 0, 3)], [entry("denoise", 3, 4, "row-0", 1)], 4 * S)
    (folder.attempts / "leftover.mp4").write_bytes(b"half a clip")
    monkeypatch.setattr(runs, "_start_ticks", lambda pid: None)
    return folder


def test_a_run_id_is_used_once(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(UsageError, match="run_id must be new, got 'run-1', which exists"):
        opened(tmp_path)


def test_a_refused_run_id_leaves_nothing_behind_and_the_first_run_untouched(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.close()
    with pytest.raises(UsageError):
        opened(tmp_path)
    assert not (tmp_path / "_attempts").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-1"]


def test_a_driver_that_was_found_dead_stops_and_writes_nothing_more(tmp_path: Path) -> None:
    """Suspended past its lease, it would tear the ledger that another driver has closed."""
    folder = opened(tmp_path)
    folder.set_workers([seat()])
    folder.write_ledger([], [entry("denoise", 0, 4, "row-0", 1)], 4 * S)
    lease = json.loads((folder.attempts / "lease.json").read_text())
    (folder.attempts / "lease.json").write_text(json.dumps({**lease, "place": "elsewhere"}))
    close_dead_runs(tmp_path, 100 * S, cost_of, "run-2")
    before = read_ledger(folder.path / "ledger")
    with pytest.raises(WorkerLost, match="found dead and closed by another driver"):
        folder.write_ledger([entry("denoise", 0, 90, "row-0", 1)], [], 100 * S)
    folder.write_ledger([], [], 101 * S)
    folder.update({"state": "finished"})
    assert read_ledger(folder.path / "ledger") == before
    assert read_run(folder.path)["state"] == "lost"


def test_an_unreadable_ledger_of_a_dead_run_does_not_stop_later_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = died(tmp_path, monkeypatch)
    (folder.path / "ledger" / "part-00000.parquet").write_bytes(b"")
    assert close_dead_runs(tmp_path, 100 * S, cost_of, "run-2") == ["run-1"]
    run = read_run(folder.path)
    assert run["state"] == "lost" and "part-00000.parquet" in run["ledger_problem"]


def test_a_lease_that_was_never_finished_is_swept_only_when_it_is_old(tmp_path: Path) -> None:
    half = tmp_path / "_attempts" / ".run-0.abc"
    half.mkdir(parents=True)
    made_ns = half.stat().st_mtime_ns
    close_dead_runs(tmp_path, made_ns + 29 * S, cost_of, "run-2")
    assert half.is_dir()
    close_dead_runs(tmp_path, made_ns + 31 * S, cost_of, "run-2")
    assert not half.exists()


def test_a_number_that_is_not_finite_is_null_in_the_event_log(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.log("rejected", 1, row={"fps": float("nan"), "tags": [float("inf")]})
    (event,) = read_events(folder.path)
    assert event["row"] == {"fps": None, "tags": [None]}


def test_a_living_driver_is_left_alone(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert close_dead_runs(tmp_path, 10**9 * S, cost_of, "run-2") == []
    assert folder.attempts.is_dir()


def test_a_driver_on_another_machine_lives_until_its_lease_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)
    lease = json.loads((folder.attempts / "lease.json").read_text())
    (folder.attempts / "lease.json").write_text(json.dumps({**lease, "place": "elsewhere"}))
    assert close_dead_runs(tmp_path, 29 * S, cost_of, "run-2") == []
    assert close_dead_runs(tmp_path, 31 * S, cost_of, "run-2") == ["run-1"]


def test_a_dead_run_is_closed_with_an_unknown_tail_and_its_attempts_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = died(tmp_path, monkeypatch)
    assert close_dead_runs(tmp_path, 100 * S, cost_of, "run-2") == ["run-1"]
    entries = read_ledger(folder.path / "ledger")
    assert [(e.state, e.t0_ns / S, e.t1_ns / S) for e in entries] == [
        ("weight_load", 0, 3), ("denoise", 3, 4), ("unknown", 4, 6),
    ]  # fmt: skip
    run: dict[str, Any] = read_run(folder.path)
    assert (run["state"], run["workers"][0]["released_ns"]) == ("lost", 6 * S)
    assert not (tmp_path / "_attempts").exists()


def test_closing_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is killed while it closes another's run leaves work that the next one does the same way."""
    folder = died(tmp_path, monkeypatch)
    close_dead_runs(tmp_path, 100 * S, cost_of, "run-2")
    once = read_ledger(folder.path / "ledger")
    run = read_run(folder.path)
    (folder.path / "run.json").write_text(json.dumps({**run, "state": "running", "workers": [
        {**run["workers"][0], "released_ns": None}]}))  # fmt: skip
    folder.attempts.mkdir(parents=True)
    close_dead_runs(tmp_path, 200 * S, cost_of, "run-3")
    assert read_ledger(folder.path / "ledger") == once
    assert read_run(folder.path)["workers"] == run["workers"]


def test_the_tail_does_not_reach_beyond_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = died(tmp_path, monkeypatch)
    close_dead_runs(tmp_path, 5 * S, cost_of, "run-2")
    assert read_ledger(folder.path / "ledger")[-1].t1_ns == 5 * S


def test_events_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.log("rendered", 1, id="a")
    with (folder.path / "events" / "driver.jsonl").open("a") as stream:
        stream.write('{"event": "rend')
    assert [event["id"] for event in read_events(folder.path)] == ["a"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run must be a run folder"):
        read_run(tmp_path)
