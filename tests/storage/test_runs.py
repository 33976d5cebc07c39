"""Run folders, on a disk and in a bucket: claimed once, and closed by whoever comes after a dead driver."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError, WorkerLost
from pipeline.storage import leases, runs
from pipeline.storage.local_store import LocalStore
from pipeline.storage.processes import writer
from pipeline.storage.runs import RunFolder, close_dead_runs, read_events, read_run
from pipeline.storage.store import Store
from pipeline.storage.tables import read_ledger
from tests.unit.makers import S, entry, seat

RUN_FACTS = {"run_id": "run-1", "state": "running", "price_id": "p", "workers": [], "totals": {"rows": 3}}
LEASE = "_attempts/run-1/lease.json"


def opened(store: Store, run_id: str = "run-1", now_s: float = 0) -> RunFolder:
    folder = RunFolder(store, run_id)
    folder.open({**RUN_FACTS, "run_id": run_id}, round(now_s * S))
    return folder


def cost_of(price_id: str, duration_ns: int) -> Decimal:
    return Decimal(duration_ns) / S


def moved_elsewhere(store: Store) -> None:
    """Make the lease look like that of a driver on another machine."""
    lease = json.loads(store.read(LEASE) or b"")
    store.write(LEASE, json.dumps({**lease, "place": "elsewhere"}).encode())


@pytest.fixture
def dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with one worker, 4 s of ledger and a last sign of life at 4 s, whose driver is gone."""
    folder = opened(store)
    folder.set_workers([seat()])
    folder.write_ledger([entry("weight_load", 0, 3)], [entry("denoise", 3, 4, "row-0", 1)], 4 * S)
    store.write("_attempts/run-1/leftover.mp4", b"half a clip")
    monkeypatch.setattr(leases, "start_ticks", lambda pid: None)
    return folder


def test_a_run_id_is_used_once_and_a_refused_one_leaves_nothing_behind(store: Store) -> None:
    first = opened(store)
    with pytest.raises(UsageError, match="run_id must be new, got 'run-1', which exists"):
        opened(store)
    first.close()
    with pytest.raises(UsageError):
        opened(store)
    assert store.folders("_attempts") == [] and store.folders("runs") == ["run-1"]


def test_a_driver_that_was_found_dead_stops_and_writes_nothing_more(store: Store) -> None:
    """Suspended past its lease, it would tear the ledger that another driver has closed."""
    folder = opened(store)
    folder.set_workers([seat()])
    folder.write_ledger([], [entry("denoise", 0, 4, "row-0", 1)], 4 * S)
    moved_elsewhere(store)
    close_dead_runs(store, 100 * S, cost_of, "run-2")
    before = read_ledger(store, "run-1")
    with pytest.raises(WorkerLost, match="found dead and closed by another driver"):
        folder.write_ledger([entry("denoise", 0, 90, "row-0", 1)], [], 100 * S)
    folder.write_ledger([], [], 101 * S)
    folder.update({"state": "finished"})
    assert read_ledger(store, "run-1") == before
    assert read_run(store, "run-1")["state"] == "lost"


def test_an_unreadable_ledger_of_a_dead_run_does_not_stop_later_runs(store: Store, dead: RunFolder) -> None:
    store.write("runs/run-1/ledger/part-00000.parquet", b"")
    assert close_dead_runs(store, 100 * S, cost_of, "run-2") == ["run-1"]
    run = read_run(store, "run-1")
    assert run["state"] == "lost" and "part-00000.parquet" in run["ledger_problem"]


def test_a_number_that_is_not_finite_is_null_in_the_event_log(store: Store) -> None:
    folder = opened(store)
    folder.log("rejected", 1, row={"fps": float("nan"), "tags": [float("inf")]})
    folder.write_ledger([], [], 0)
    (event,) = read_events(store, "run-1")
    assert event["row"] == {"fps": None, "tags": [None]}


def test_many_events_keep_their_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "EVENTS_FILE_LINES", 3)
    folder = opened(store)
    for number in range(8):
        folder.log("n", number)
        folder.write_ledger([], [], 0)
    assert [event["at_ns"] for event in read_events(store, "run-1")] == list(range(8))


def test_a_living_driver_is_left_alone(store: Store) -> None:
    opened(store)
    assert close_dead_runs(store, 10**9 * S, cost_of, "run-2") == []
    assert store.read(LEASE) is not None


def test_a_driver_on_another_machine_lives_until_its_lease_runs_out(store: Store) -> None:
    opened(store)
    moved_elsewhere(store)
    assert close_dead_runs(store, 29 * S, cost_of, "run-2") == []
    assert close_dead_runs(store, 31 * S, cost_of, "run-2") == ["run-1"]


def test_a_dead_run_is_closed_with_an_unknown_tail_and_its_attempts_are_swept(store: Store, dead: RunFolder) -> None:
    assert close_dead_runs(store, 100 * S, cost_of, "run-2") == ["run-1"]
    assert [(e.state, e.t0_ns / S, e.t1_ns / S) for e in read_ledger(store, "run-1")] == [
        ("weight_load", 0, 3), ("denoise", 3, 4), ("unknown", 4, 6),
    ]  # fmt: skip
    run: dict[str, Any] = read_run(store, "run-1")
    assert (run["state"], run["workers"][0]["released_ns"]) == ("lost", 6 * S)
    assert store.folders("_attempts") == []


def test_a_worker_whose_release_was_written_but_not_the_last_of_its_ledger_gets_that_tail(
    store: Store, dead: RunFolder
) -> None:
    """A worker dies, its seat is written as released, and the driver is killed before it writes the ledger."""
    dead.set_workers([replace(seat(), released_ns=5 * S)])
    close_dead_runs(store, 100 * S, cost_of, "run-2")
    tail = read_ledger(store, "run-1")[-1]
    assert (tail.state, tail.t0_ns, tail.t1_ns) == ("unknown", 4 * S, 5 * S)
    assert read_run(store, "run-1")["workers"][0]["released_ns"] == 5 * S


def test_a_worker_that_the_dead_driver_closed_stays_as_it_is(store: Store, dead: RunFolder) -> None:
    lost = replace(entry("denoise", 4, 5), state="unknown")
    dead.set_workers([replace(seat(), released_ns=5 * S)])
    dead.write_ledger([entry("denoise", 3, 4, "row-0", 1), lost], [], 5 * S)
    before = read_ledger(store, "run-1")
    close_dead_runs(store, 100 * S, cost_of, "run-2")
    assert read_ledger(store, "run-1") == before and before[-1] == lost


def test_closing_twice_changes_nothing(store: Store, dead: RunFolder) -> None:
    """A driver that is killed while it closes another's run leaves work that the next one does the same way."""
    close_dead_runs(store, 100 * S, cost_of, "run-2")
    once, run = read_ledger(store, "run-1"), read_run(store, "run-1")
    again = {**run, "state": "running", "workers": [{**run["workers"][0], "released_ns": None}]}
    store.write("runs/run-1/run.json", json.dumps(again).encode())
    store.write("_attempts/run-1/leftover.mp4", b"x")
    close_dead_runs(store, 200 * S, cost_of, "run-3")
    assert read_ledger(store, "run-1") == once
    assert read_run(store, "run-1")["workers"] == run["workers"]


def test_the_tail_does_not_reach_beyond_now(store: Store, dead: RunFolder) -> None:
    close_dead_runs(store, 5 * S, cost_of, "run-2")
    assert read_ledger(store, "run-1")[-1].t1_ns == 5 * S


def test_events_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder = opened(store)
    folder.log("rendered", 1, id="a")
    store.append("runs/run-1/events/driver.jsonl", '{"event": "rend')
    assert [event["id"] for event in read_events(store, "run-1")] == ["a"]


def test_half_written_files_are_swept_when_their_writer_is_gone_or_they_are_old(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    attempts = tmp_path / "_attempts"
    attempts.mkdir()
    mine, machine = writer(), writer().partition("-")[0]
    names = {f".{mine}-a": True, f".{machine}-1-0-b": False, ".elsewhere-1-0-c": True, ".elsewhere-1-0-old": False}
    for name in names:
        (attempts / name).write_bytes(b"half")
    os.utime(attempts / ".elsewhere-1-0-old", (time.time() - 4000, time.time() - 4000))
    store.sweep(time.time_ns() - 600 * S)
    assert {name: (attempts / name).exists() for name in names} == names


def test_what_a_killed_worker_left_half_written_is_gone_when_its_run_ends(tmp_path: Path) -> None:
    folder = opened(LocalStore(tmp_path))
    (tmp_path / "_attempts" / f".{writer().partition('-')[0]}-1-0-b").write_bytes(b"half a record")
    folder.close()
    assert not (tmp_path / "_attempts").exists()


def test_a_folder_that_is_no_run_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="run must be a run folder"):
        read_run(store, "nothing")
