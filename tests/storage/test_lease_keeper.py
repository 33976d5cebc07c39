"""The leases of a run while its driver is busy with something long: renewed beside it, and never after its end."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StorageUnavailable, WorkerLost
from pipeline.storage import committer, lease_keeper
from pipeline.storage.committer import COMMITTER
from pipeline.storage.local_store import LocalStore
from pipeline.storage.runs import CLOSED, RunFolder, lease_name
from pipeline.storage.store import Store
from pipeline.storage.tables import read_ledger
from tests.unit.makers import S, entry

FACTS = {"run_id": "run-1", "state": "running", "price_id": "p", "workers": []}
EVERY_S = 0.05
LEASE = lease_name("run-1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "RENEW_EVERY_S", EVERY_S)
    monkeypatch.setattr(committer, "SETTLE_S", 0.1)


def opened(store: Store, now_s: float = 0) -> RunFolder:
    folder = RunFolder(store, "run-1")
    folder.open(FACTS, round(now_s * S))
    return folder


def renewed_ns(store: Store, name: str = LEASE) -> int:
    return int(json.loads(store.read(name) or b"{}").get("renewed_ns", -1))


def eventually(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(EVERY_S / 5)


def test_a_driver_that_writes_nothing_for_long_still_renews_its_leases(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, is_exclusive=False)
    folder = opened(store, now_s=1000)
    for name in (LEASE, COMMITTER):
        eventually(lambda name=name: 1000 * S < renewed_ns(store, name) < 1020 * S)
    folder.close()


def test_nothing_is_renewed_after_a_run_was_closed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder = opened(store)
    eventually(lambda: renewed_ns(store) > 0)
    folder.close()
    time.sleep(3 * EVERY_S)
    assert not (tmp_path / "_attempts").exists()


def test_a_run_that_another_driver_closed_renews_nothing_more(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder = opened(store)
    store.write(f"runs/run-1/{CLOSED}", b"{}")
    time.sleep(2 * EVERY_S)
    store.delete_folder("_attempts/run-1")
    time.sleep(3 * EVERY_S)
    assert store.read(LEASE) is None
    with pytest.raises(WorkerLost, match="found dead and closed by another driver"):
        folder.close()


def test_a_folder_that_its_driver_dropped_is_not_renewed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    opened(store)
    gc.collect()
    time.sleep(2 * EVERY_S)
    last = renewed_ns(store)
    time.sleep(3 * EVERY_S)
    assert renewed_ns(store) == last


class Away(LocalStore):
    """A disk that takes no ledger, or no lease, while `away` says so."""

    away = ""

    def with_patience(self, patience: object) -> Away:
        return self

    def write(self, name: str, content: bytes) -> None:
        if self.away and self.away in name:
            raise StorageUnavailable(f"{name} is away")
        super().write(name, content)

    def read(self, name: str) -> bytes | None:
        if self.away and self.away in name:
            raise StorageUnavailable(f"{name} is away")
        return super().read(name)


def test_a_store_that_is_away_is_logged_and_the_lease_renewed_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Away(tmp_path)
    folder = opened(store)
    store.away = "lease.json"
    eventually(lambda: "leases were not renewed" in caplog.text)
    store.away = ""
    eventually(lambda: renewed_ns(store) > 0)
    folder.close()


@pytest.mark.parametrize("away", ["ledger", CLOSED])
def test_a_ledger_that_could_not_be_written_is_written_with_the_next(tmp_path: Path, away: str) -> None:
    store = Away(tmp_path)
    folder = opened(store)
    store.away = away
    with pytest.raises(StorageUnavailable):
        folder.write_ledger([entry("denoise", 0, 3, "row-0", 1)], [], 3 * S)
    store.away = ""
    folder.write_ledger([entry("idle", 3, 4)], [], 4 * S)
    assert [(e.state, e.t1_ns) for e in read_ledger(store, "run-1")] == [("denoise", 3 * S), ("idle", 4 * S)]
    folder.close()
