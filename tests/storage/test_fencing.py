"""Who may write a run: one driver of its id, none that was found dead; and sweeping, which spares the living."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import UsageError, WorkerLost
from pipeline.storage import leases
from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import _PROBE, ObjectStore
from pipeline.storage.processes import writer
from pipeline.storage.runs import RunFolder, close_dead_runs, lease_name, read_run
from pipeline.storage.store import Store, open_store
from pipeline.storage.tables import read_ledger
from tests.chaos.s3_faults import Fault, Request, faults_before, refusing
from tests.conftest import make_bucket, s3_at
from tests.unit.makers import S, entry, seat

NUM_RACES = 50
FACTS = {"run_id": "run", "state": "running", "price_id": "p", "workers": []}


def cost_of(price_id: str, duration_ns: int) -> Decimal:
    return Decimal(duration_ns) / S


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, or the error they raise, all begun at the same moment."""
    barrier = threading.Barrier(len(calls))

    def call(each: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return each()
        except Exception as error:  # noqa: BLE001 - what it is is for the test to judge
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_of_drivers_that_race_for_one_run_id_exactly_one_opens_it(store: Store) -> None:
    """Three drivers, one of which closes what is dead at the same moment, as each does before it opens its run."""
    for number in range(NUM_RACES):
        run_id = f"run-{number}"
        folders = [RunFolder(open_store(store.root_uri), run_id) for _ in range(3)]
        opening = [
            lambda folder=folder, n=n: folder.open({**FACTS, "driver": n}, 0) for n, folder in enumerate(folders)
        ]
        sweeper = open_store(store.root_uri)
        *opened, closed = together([*opening, lambda at=sweeper: close_dead_runs(at, time.time_ns(), cost_of, "other")])
        (winner,) = [n for n, error in enumerate(opened) if error is None]
        refused = [error for error in opened if error is not None]
        assert all(isinstance(error, UsageError) and "run_id must be new" in str(error) for error in refused)
        assert closed == [] and read_run(store, run_id)["driver"] == winner
        folders[winner].write_ledger([], [], S)
        folders[winner].update({"state": "finished"})
        folders[winner].close()
    assert store.folders("_attempts") == []


@pytest.fixture
def fenced(store: Store) -> RunFolder:
    """A run that stood still on another machine for longer than its lease and was closed by run-2."""
    folder = RunFolder(store, "run-1")
    folder.open(FACTS, 0)
    folder.set_workers([seat()])
    folder.write_ledger([entry("weight_load", 0, 3)], [entry("denoise", 3, 4, "row-0", 1)], 4 * S)
    lease = json.loads(store.read(lease_name("run-1")) or b"")
    store.write(lease_name("run-1"), json.dumps({**lease, "place": "elsewhere"}).encode())
    assert close_dead_runs(store, 100 * S, cost_of, "run-2") == ["run-1"]
    return folder


WRITES: dict[str, Callable[[RunFolder], None]] = {
    "update": lambda folder: folder.update({"state": "finished"}),
    "set_workers": lambda folder: folder.set_workers([]),
    "log": lambda folder: folder.log("rendered", 1, id="a"),
    "write_ledger": lambda folder: folder.write_ledger([entry("denoise", 0, 90, "row-0", 1)], [], 100 * S),
    "write_results": lambda folder: folder.write_results([], pa.table({})),
    "close": lambda folder: folder.close(),
}


def everything(store: Store, folder: str = "") -> dict[str, bytes | None]:
    names = [f"{folder}{name}" for name in store.sizes(folder)]
    inner = [everything(store, f"{folder}{name}/") for name in store.folders(folder)]
    return {name: store.read(name) for name in names} | {name: text for part in inner for name, text in part.items()}


@pytest.mark.parametrize("first", WRITES)
def test_a_driver_that_wakes_up_after_it_was_found_dead_writes_nothing_by_any_way(
    store: Store, fenced: RunFolder, first: str
) -> None:
    before = everything(store)
    with pytest.raises(WorkerLost, match="run run-1 was found dead and closed by another driver while it stood still"):
        WRITES[first](fenced)
    for write in WRITES.values():
        write(fenced)
    assert everything(store) == before
    assert [e.state for e in read_ledger(store, "run-1")] == ["weight_load", "denoise", "unknown"]


def test_drivers_that_sweep_at_once_close_a_dead_run_the_same_way(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = RunFolder(store, "alive")
    alive.open(FACTS, 0)
    for number in range(5):
        folder = RunFolder(store, f"run-{number}")
        folder.open({**FACTS, "run_id": f"run-{number}"}, 0)
        folder.set_workers([seat()])
        folder.write_ledger([entry("denoise", 0, 4, "row-0", 1)], [], 4 * S)
        store.write(f"_attempts/run-{number}/half.mp4", b"half a clip")
        lease = json.loads(store.read(lease_name(f"run-{number}")) or b"")
        store.write(lease_name(f"run-{number}"), json.dumps({**lease, "place": "elsewhere"}).encode())
    sweepers = [open_store(store.root_uri) for _ in range(4)]
    closed = together(
        [lambda at=at, n=n: close_dead_runs(at, (100 + n) * S, cost_of, f"new-{n}") for n, at in enumerate(sweepers)]
    )
    assert all(isinstance(ids, list) for ids in closed), closed
    assert {run_id for ids in closed for run_id in ids} == {f"run-{number}" for number in range(5)}
    assert store.folders("_attempts") == ["alive"]
    for number in range(5):
        run, claim = read_run(store, f"run-{number}"), json.loads(store.read(f"runs/run-{number}/closed.json") or b"")
        assert (run["state"], run["closed_by_run"]) == ("lost", claim["by_run"])
        assert [(e.state, e.t0_ns, e.t1_ns) for e in read_ledger(store, f"run-{number}")] == [
            ("denoise", 0, 4 * S), ("unknown", 4 * S, 6 * S),
        ]  # fmt: skip


def test_a_folder_that_a_driver_is_just_making_is_left_to_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "_attempts" / "run-1").mkdir(parents=True)
    removed: list[str] = []
    store.delete_folder = removed.append  # type: ignore[method-assign]
    close_dead_runs(store, 10**9 * S, cost_of, "run-2")
    assert removed == [] and not (tmp_path / "_attempts").exists(), (
        "what is empty is swept by rmdir, which spares files"
    )


def begun(bucket: str, key: str, store: ObjectStore) -> None:
    store._fs.call_s3("create_multipart_upload", Bucket=bucket.removeprefix("s3://"), Key=key)


def open_uploads(bucket: str, store: ObjectStore) -> list[str]:
    return sorted(upload["Key"] for upload in store._fs.list_multipart_uploads(bucket.removeprefix("s3://")))


def test_uploads_that_began_before_all_that_lives_are_swept_and_no_others(s3_server: Callable[[str], str]) -> None:
    """On ministack alone: moto says of every upload that it began in 2010."""
    with s3_at(s3_server("ministack")):
        check_which_uploads_are_swept(make_bucket())


def check_which_uploads_are_swept(bucket: str) -> None:
    store = ObjectStore(f"{bucket}/out")
    begun(bucket, "out/videos/a.mp4", store)
    begun(bucket, "out-2/videos/other.mp4", store)
    later_ns = round((datetime.now(UTC) + timedelta(hours=2)).timestamp() * S)
    living = RunFolder(store, "alive")
    living.open(FACTS, time.time_ns())
    close_dead_runs(store, later_ns, cost_of, "run-2")
    assert open_uploads(bucket, store) == ["out-2/videos/other.mp4", "out/videos/a.mp4"], "the living run may write it"
    living.close()
    results = together([lambda: close_dead_runs(ObjectStore(f"{bucket}/out"), later_ns, cost_of, "run-2")] * 3)
    assert results == [[], [], []]
    assert open_uploads(bucket, store) == ["out-2/videos/other.mp4"]


@pytest.mark.parametrize("folder", ["/out", ""], ids=["in a folder", "at the root"])
def test_all_pages_of_a_long_list_of_uploads_are_swept(
    bucket: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(f"{bucket}{folder}")
    for number in range(5):
        begun(bucket, f"{folder}/videos/{number}.mp4".strip("/"), store)
    real = store._fs.call_s3
    paged = lambda method, **kw: real(method, **kw, **({"MaxUploads": 2} if method.startswith("list_m") else {}))  # noqa: E731
    monkeypatch.setattr(store._fs, "call_s3", paged)
    store.sweep(time.time_ns() + 3600 * S)
    assert open_uploads(bucket, store) == []


class NoUploadsListed:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def choose(self, request: Request) -> Fault | None:
        return self._fault if request.method == "GET" and "uploads" in request.target else None


@pytest.mark.parametrize("answer", [(501, "NotImplemented"), (405, "MethodNotAllowed"), (403, "AccessDenied")])
def test_a_store_that_does_not_list_uploads_is_used_without(
    bucket: str, s3_endpoint: str, answer: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    with faults_before(s3_endpoint, NoUploadsListed(refusing(*answer))) as proxy, s3_at(proxy.url):
        store = ObjectStore(bucket)
        store.prepare()
        begin_s = time.monotonic()
        assert close_dead_runs(store, time.time_ns(), cost_of, "run-1") == []
        assert time.monotonic() - begin_s < 2
    assert "abandoned uploads were not swept" in caplog.text


def test_a_probe_that_a_killed_driver_left_is_swept_at_once_or_from_elsewhere_when_it_is_old(bucket: str) -> None:
    store, mine = ObjectStore(bucket), writer()
    killed = f"{mine.rpartition('-')[0]}-0"
    stays = {f"{mine}{_PROBE}50-a": True, f"{killed}{_PROBE}50-b": False, f"elsewhere-1-0{_PROBE}50-c": True,
             f"elsewhere-1-0{_PROBE}5-d": False}  # fmt: skip
    for name in stays:
        store.write(f"_attempts/{name}", b"first")
    store.sweep(10)
    assert {name: name in store.sizes("_attempts") for name in stays} == stays


def test_two_leases_of_one_process_differ() -> None:
    """The loser of a race must not take the winner's lease for its own, whose acknowledgement was lost."""
    one, other = leases.Lease("run-1", 0), leases.Lease("run-1", 0)
    assert one.content(0) != other.content(0) and not one.is_this(json.loads(other.content(0)))
