"""An output without conditional puts has one driver at a time, whatever the drivers' timing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError, WorkerLost
from pipeline.storage.committer import COMMITTER, Committer
from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.runs import RunFolder, close_dead_runs
from pipeline.storage.store import Store
from tests.chaos.s3_faults import Fault, Request, faults_before, forget_the_condition
from tests.conftest import make_bucket, s3_at
from tests.unit.makers import S

# Longer than a bucket takes to answer on a busy machine.
SETTLE_S = 1.0
FACTS = {"run_id": "run", "state": "running", "price_id": "p", "workers": []}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.committer.SETTLE_S", SETTLE_S)


class Overwriting:
    def choose(self, request: Request) -> Fault | None:
        return forget_the_condition if request.is_conditional_put else None


@pytest.fixture(params=["bucket", "disk"])
def overwriting(request: pytest.FixtureRequest, s3_server: Callable[[str], str], tmp_path: Path) -> Iterator[Store]:
    """A bucket that overwrites silently, found out by its probe; and a disk without hard links."""
    if request.param == "disk":
        yield LocalStore(tmp_path / "out", is_exclusive=False)
        return
    upstream = s3_server("moto")
    with s3_at(upstream):
        bucket = make_bucket()
    with faults_before(upstream, Overwriting()) as proxy, s3_at(proxy.url):
        store = ObjectStore(f"{bucket}/out")
        store.prepare()
        yield store


def elsewhere(store: Store) -> None:
    """Make the standing lease look like that of a driver on another machine."""
    lease = json.loads(store.read(COMMITTER) or b"")
    store.write(COMMITTER, json.dumps({**lease, "place": "elsewhere"}).encode())


def test_the_second_driver_is_told_who_holds_the_output_and_until_when(overwriting: Store) -> None:
    first = Committer(overwriting, "run-1")
    first.claim(0)
    elsewhere(overwriting)
    with pytest.raises(UsageError, match=r"which run run-1 holds until 1970-01-01T00:00:30\+00:00 or its end; wait"):
        Committer(overwriting, "run-2").claim(29 * S)
    first.release()
    assert overwriting.read(COMMITTER) is None
    Committer(overwriting, "run-2").claim(29 * S)


def test_an_expired_lease_is_taken_over_and_its_holder_ends(overwriting: Store) -> None:
    first, second = Committer(overwriting, "run-1"), Committer(overwriting, "run-2")
    first.claim(0)
    elsewhere(overwriting)
    second.claim(31 * S)
    with pytest.raises(WorkerLost, match="was taken over by run run-2 while run run-1 stood still"):
        first.renew(32 * S)
    first.release()
    second.renew(33 * S)
    assert json.loads(overwriting.read(COMMITTER) or b"")["expires_ns"] == 63 * S


def test_of_drivers_that_find_the_output_free_at_once_exactly_one_holds_it(overwriting: Store) -> None:
    for number in range(10):
        barrier, held, refused = threading.Barrier(4), [], []

        def contend(name: str) -> None:
            own = Committer(overwriting, name)
            barrier.wait()  # noqa: B023 - the threads end within the round
            try:
                own.claim(time.time_ns())
                held.append(own)  # noqa: B023
            except UsageError as error:
                refused.append(error)  # noqa: B023

        threads = [threading.Thread(target=contend, args=(f"run-{number}-{each}",)) for each in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1 and len(refused) == 3
        held[0].release()


def test_a_driver_that_was_too_slow_withdraws(tmp_path: Path) -> None:
    """It saw the output free, stood still, and wrote when another may already have held it."""

    class Slow(LocalStore):
        def write(self, name: str, content: bytes) -> None:
            time.sleep(1.5 * SETTLE_S)
            super().write(name, content)

    store = Slow(tmp_path, is_exclusive=False)
    with pytest.raises(UsageError, match=r"output must answer within 1 s to be written without conditional puts"):
        Committer(store, "run-1").claim(0)
    assert store.read(COMMITTER) is None


def test_a_run_holds_an_output_without_conditional_puts_from_its_beginning_to_its_end(overwriting: Store) -> None:
    first = RunFolder(overwriting, "run-1")
    first.open(FACTS, 0)
    with pytest.raises(UsageError, match="which run run-1 holds until"):
        RunFolder(overwriting, "run-2").open(FACTS, 0)
    first.write_ledger([], [], 5 * S)
    assert json.loads(overwriting.read(COMMITTER) or b"")["renewed_ns"] == 5 * S
    first.close()
    second = RunFolder(overwriting, "run-2")
    second.open(FACTS, 0)
    second.close()
    with pytest.raises(UsageError, match="run_id must be new, got 'run-1'"):
        RunFolder(overwriting, "run-1").open(FACTS, 0)
    assert overwriting.read(COMMITTER) is None, "who is refused holds nothing"


def test_a_run_that_lost_the_output_writes_nothing_more(overwriting: Store) -> None:
    first, second = RunFolder(overwriting, "run-1"), RunFolder(overwriting, "run-2")
    first.open(FACTS, 0)
    elsewhere(overwriting)
    second.open(FACTS, 31 * S)
    with pytest.raises(PipelineError, match="was taken over by run run-2"):
        first.write_ledger([], [], 32 * S)
    before = overwriting.read("runs/run-1/run.json")
    first.update({"state": "finished"})
    assert first.fenced and overwriting.read("runs/run-1/run.json") == before
    assert close_dead_runs(overwriting, 32 * S, lambda price_id, ns: 0, "run-2") == []


def test_a_driver_may_commit_while_it_holds_the_output_and_not_after_another_took_it(overwriting: Store) -> None:
    first, second = RunFolder(overwriting, "run-1"), RunFolder(overwriting, "run-2")
    first.open(FACTS, 0)
    first.require_output(20 * S)
    assert json.loads(overwriting.read(COMMITTER) or b"")["renewed_ns"] == 0, "looking is enough"
    elsewhere(overwriting)
    second.open(FACTS, 31 * S)
    with pytest.raises(WorkerLost, match="was taken over by run run-2"):
        first.require_output(20 * S)
    assert first.fenced
    second.close()
    with pytest.raises(WorkerLost, match="was taken over by another driver"):
        Committer.require(first._committer, 33 * S)  # type: ignore[arg-type]


def test_a_hold_that_ran_out_while_the_store_was_away_is_taken_again_before_a_commit(overwriting: Store) -> None:
    folder = RunFolder(overwriting, "run-1")
    folder.open(FACTS, 0)
    begin_s = time.monotonic()
    folder.require_output(40 * S)
    assert time.monotonic() - begin_s >= SETTLE_S
    assert json.loads(overwriting.read(COMMITTER) or b"")["expires_ns"] == 70 * S


def test_of_an_output_with_conditional_puts_nothing_is_held(tmp_path: Path) -> None:
    folder = RunFolder(LocalStore(tmp_path), "run-1")
    folder.open(FACTS, 0)
    folder.require_output(10**9 * S)
    folder.close()
