"""A Ray of two CPUs for the tests of the pool, and a driver over it."""

from __future__ import annotations

import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import Ending, StopRequest
from pipeline.cluster.pool import WorkerFactory
from pipeline.cluster.progress import Counts, Progress
from pipeline.cluster.ray_pool import RayPool
from pipeline.cluster.ray_session import _descendants
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.cost.meter import utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import Offer, WorkItem
from tests.chaos.ray_nodes import new_cluster
from tests.unit.makers import FACTS, item

PRICE = UnitPrice("p", 3600)  # type: ignore[arg-type] - a dollar a second keeps the sums readable


# Of each node: records are small.
NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[Cluster]:
    """A cluster of one node at first, ended with the session; whatever else runs on this machine is left alone."""
    with (
        tempfile.TemporaryDirectory(prefix="rt-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory() as commands,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Where a test may put an nvidia-smi of its own; the GPU is one in name only.
        patch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
        head = {"num_cpus": 2, "num_gpus": 1, "temp_dir": folder, **NODE}
        cluster = new_cluster(head)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


class MemoryLog:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.first_ns: dict[str, int] = {}
        self.entries: list[LedgerEntry] = []
        self.seats: list[WorkerSeat] = []

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        self.events.append((event, facts))
        self.first_ns.setdefault(event, now_ns)

    def set_workers(self, seats: list[WorkerSeat]) -> None:
        self.seats = list(seats)

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None:
        named = {seat.gpu_id for seat in self.seats}
        assert {entry.gpu_id for entry in (*closed, *running)} <= named, "a seat must be written before its ledger"
        self.entries.extend(closed)


class Farm:
    """One run of a driver over a Ray pool."""

    def __init__(
        self, prompts: list[str], factory: WorkerFactory, *, offers: tuple[Offer, ...] = (), **plan: Any
    ) -> None:
        now_ns = utc_clock()
        layout, num_workers = ParallelLayout(plan.pop("num_ranks", 1)), plan.pop("num_workers", 2)
        max_ranks = None if num_workers is None else num_workers * layout.num_gpus
        settings = {"device": "cpu", "max_ranks": max_ranks, "start_timeout_s": 30.0, **plan}
        self.pool = RayPool(factory, WorkerPlan("run-1", price=PRICE, threads=1, **settings), now_ns)
        self.log = MemoryLog()
        self.stop = StopRequest()
        items = [item(index, prompt=prompt) for index, prompt in enumerate(prompts)]
        self.items: list[WorkItem] = [replace(each, layout=layout, offers=offers) for each in items]
        self.driver = Driver(
            queue=WorkQueue(self.items), pool=self.pool, log=self.log, facts=FACTS, admission=Admission(),
            stop=self.stop, counts=Counts(len(prompts), 0, 0), progress=Progress(io.StringIO()), now_ns=now_ns,
            flush_every_s=0.5,
        )  # fmt: skip

    def facts(self, event: str) -> list[dict[str, Any]]:
        return [facts for name, facts in self.log.events if name == event]

    def run(self) -> Ending:
        pids_before = set(actor_pids())
        ending = self.driver.drive()
        assert set(ending_rows(ending)) == {item.request.id for item in self.items}
        check_seats(self.log)
        # The next test may ask for both CPUs, so this also waits for Ray to notice.
        deadline_s = time.monotonic() + 5
        while ray.is_initialized() and ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert set(actor_pids()) <= pids_before, "a worker's process was left behind"
        return ending


def ending_rows(ending: Ending) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in ending.rows}


def check_seats(log: MemoryLog) -> None:
    """Each seat is released, and its entries partition its time to the nanosecond."""
    for seat in log.seats:
        own = sorted((e for e in log.entries if e.gpu_id == seat.gpu_id), key=lambda e: e.t0_ns)
        assert seat.released_ns is not None and own, seat
        assert (own[0].t0_ns, own[-1].t1_ns) == (seat.acquired_ns, seat.released_ns)
        assert all(a.t1_ns == b.t0_ns for a, b in pairwise(own)), own


def actor_pids() -> list[int]:
    """Living processes under this one that hold one of our actors: others may run theirs on the same machine."""
    found = []
    for pid in _descendants(os.getpid()):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::WorkerProcess"):
                found.append(pid)
    return found


@pytest.fixture
def farm(two_cpus: Cluster) -> Callable[..., Farm]:
    return Farm
