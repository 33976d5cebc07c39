"""The proxy that breaks an S3 server, and what a store makes of it."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import StorageUnavailable
from pipeline.storage.filesystem import sha256_of
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.patience import Patience
from tests.chaos.s3_faults import FAULTS, Request, SeededPlan, faults_before
from tests.conftest import make_bucket, s3_at

PUT = Request("PUT", "/bucket/key", {"if-none-match": "*"}, b"x")
NUM_NAMES = 60
# Of each name: creators, who race, readers among them, and one who writes another file.
NUM_CREATORS = 3


@pytest.fixture(params=["moto", "ministack"])
def upstream(request: pytest.FixtureRequest, s3_server: Callable[[str], str]) -> str:
    return s3_server(request.param)


def test_one_seed_gives_one_plan_with_all_kinds_and_no_more_faults_than_asked_for() -> None:
    plans = [SeededPlan(seed, 0.5, max_faults=400) for seed in (1, 1, 2)]
    chosen = [[plan.choose(PUT) for _ in range(2_000)] for plan in plans]
    assert chosen[0] == chosen[1] != chosen[2]
    assert plans[0].counts.total() == 400
    assert set(plans[0].counts) == FAULTS.keys() - {"truncated"}


def test_a_proxy_without_faults_is_the_server(upstream: str, tmp_path: Path) -> None:
    with faults_before(upstream, SeededPlan(0, 0.0)) as proxy, s3_at(proxy.url):
        store = ObjectStore(f"{make_bucket()}/out")
        for number in range(30):
            assert store.create(f"a/{number}", b"x" * number)
        assert store.sizes("a") == {str(number): number for number in range(30)}
        assert proxy.num_requests >= 31
        assert store.read("a/7") == b"x" * 7 and store.read("absent") is None


def test_racing_writers_behind_faults_have_one_winner_a_name_and_lose_nothing(upstream: str, tmp_path: Path) -> None:
    """300 operations. A store that stays away may be said to be unavailable; nothing else may escape."""
    plan = SeededPlan(5, 0.25)
    contents = {
        f"{number}-{writer}": f"{number} by {writer} ".encode() * 500
        for number in range(NUM_NAMES)
        for writer in range(NUM_CREATORS)
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with s3_at(upstream):
        bucket = f"{make_bucket()}/out"
    with faults_before(upstream, plan) as proxy, s3_at(proxy.url):
        store = ObjectStore(bucket, patience=Patience(30.0), answer_timeout_s=1.0)
        jobs = [(("create", "read")[writer == NUM_CREATORS], number, writer)
                for number in range(NUM_NAMES) for writer in range(NUM_CREATORS + 1)]  # fmt: skip
        jobs += [("write", number, 0) for number in range(NUM_NAMES)]
        random.Random(0).shuffle(jobs)

        def work(job: tuple[str, int, int]) -> tuple[str, int, object]:
            kind, number, writer = job
            if kind == "read":
                return kind, number, store.read(f"created/{number}")
            if kind == "write":
                store.write(f"written/{number}", contents[f"{number}-0"])
                return kind, number, None
            path = tmp_path / f"{number}-{writer}"
            # Files and bytes in turn: they take different ways.
            try:
                was_ours = store.create(f"created/{number}", path if number % 2 else path.read_bytes())
            except StorageUnavailable:
                return "unavailable", number, writer
            return kind, number, writer if was_ours else None

        with ThreadPoolExecutor(16) as pool:
            done = list(pool.map(work, jobs))

    assert len(done) == 300 and set(plan.counts) == set(FAULTS)
    winners = Counter(number for kind, number, who in done if kind == "create" and who is not None)
    unavailable = {number for kind, number, _ in done if kind == "unavailable"}
    with s3_at(upstream):
        behind = ObjectStore(bucket)
        for number in range(NUM_NAMES):
            assert winners[number] == 1 or (winners[number] == 0 and number in unavailable)
            standing = behind.read(f"created/{number}")
            won = {
                contents[f"{number}-{who}"]
                for kind, n, who in done
                if (kind, n) == ("create", number) and who is not None
            }
            assert won <= {standing}
            seen = {content for kind, n, content in done if (kind, n) == ("read", number)}
            assert seen <= {None, standing}
            assert behind.read(f"written/{number}") == contents[f"{number}-0"]


def test_files_in_parts_go_up_whole_behind_faults_and_a_sweep_removes_the_parts_that_are_left(
    upstream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_at(upstream):
        bucket = make_bucket()
    plan = SeededPlan(1, 0.15)
    with faults_before(upstream, plan) as proxy, s3_at(proxy.url):
        store = ObjectStore(f"{bucket}/out", patience=Patience(60.0), answer_timeout_s=1.0)
        monkeypatch.setattr(store._fs, "put_file", partial(store._fs.put_file, chunksize=5 * 2**20))
        for number in range(6):
            source = tmp_path / str(number)
            source.write_bytes(bytes([number]) * 11 * 2**20)
            assert store.create(str(number), source) is True
            assert store.digest(str(number)) == (sha256_of(source), 11 * 2**20)
    assert plan.counts.total() >= 5
    with s3_at(upstream):
        behind = ObjectStore(f"{bucket}/out")
        behind.sweep(time.time_ns() + 10**12)
        assert behind._fs.list_multipart_uploads(bucket.removeprefix("s3://")) == []
