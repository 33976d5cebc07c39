"""Planner, queue, policy and driver over a simulated fleet, unchanged: rows, utilisation, makespan, waste, driver load.

The long form is the one of the README: 100,000 rows over 1,000 groups of 8 GPUs.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import Ending, StopRequest
from pipeline.cluster.progress import Counts, Progress
from pipeline.cost.allocation import Allocation, allocate
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem
from tests.simulation.fleet import USD_PER_GPU_S, SimulatedPool, Weather, harm_of
from tests.unit.makers import FACTS, S, item

# Predicted seconds of the shapes of a nightly batch, and how often each comes.
SHAPES = ((12.0, 0.6), (35.0, 0.3), (150.0, 0.1))


class CountingLog:
    """Counts events and follows each GPU's ledger; a simulated night's log would fill gigabytes."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        # Where the ledger of each GPU begins, and how far it goes.
        self.t0_ns: dict[str, int] = {}
        self.t1_ns: dict[str, int] = {}

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        self.events[event] += 1

    def set_workers(self, seats: list[WorkerSeat]) -> None: ...

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None:
        for entry in closed:
            self.t0_ns.setdefault(entry.gpu_id, entry.t0_ns)
            assert self.t1_ns.get(entry.gpu_id, entry.t0_ns) == entry.t0_ns, f"a gap or an overlap on {entry.gpu_id}"
            self.t1_ns[entry.gpu_id] = entry.t1_ns

    def written_gpu_s(self) -> float:
        return (sum(self.t1_ns.values()) - sum(self.t0_ns.values())) / S


def manifest(num_rows: int, num_ranks: int, generator: random.Random) -> list[WorkItem]:
    template = item(0)
    seconds, weights = zip(*SHAPES, strict=True)
    layout = ParallelLayout(num_ranks)
    items = []
    for index, predicted_s in enumerate(generator.choices(seconds, weights, k=num_rows)):
        request = replace(template.request, id=f"row-{index}", row_index=index)
        estimate = replace(
            template.estimate, gpu_seconds=num_ranks * predicted_s, longest_step_s=predicted_s / 11, num_gpus=num_ranks
        )
        items.append(WorkItem(request, f"{index:064d}", estimate, layout=layout))
    return items


class Night:
    """One simulated run, and what a fleet's owner asks of it."""

    def __init__(self, num_rows: int, num_groups: int, num_ranks: int, weather: Weather, seed: int = 20261120) -> None:
        generator = random.Random(seed)
        self.items = manifest(num_rows, num_ranks, generator)
        self.pool = SimulatedPool(num_groups, num_ranks, weather, generator)
        self.log = CountingLog()
        driver = Driver(
            queue=WorkQueue(self.items), pool=self.pool, log=self.log, facts=FACTS, admission=Admission(),
            stop=StopRequest(), counts=Counts(num_rows, 0, 0), progress=Progress(io.StringIO()),
            now_ns=self.pool.now_ns, flush_every_s=2.0,
        )  # fmt: skip
        started_s = time.process_time()
        self.ending: Ending = driver.drive()
        self.driver_cpu_s = time.process_time() - started_s
        self.statuses = Counter(row["status"] for row in self.ending.rows)
        self.allocation: Allocation = allocate(self.ending.charges, self.ending.rendered_attempts, self.ending.wasted)
        self.bound_s = weather.load_s + max(
            sum(work.estimate.clip_s for work in self.items) / num_groups,
            max(work.estimate.clip_s for work in self.items),
        )

    def report(self) -> dict[str, Any]:
        allocation, total = self.allocation, self.allocation.total
        direct = sum((row.direct for row in allocation.rows.values()), Decimal(0))
        num_outcomes = self.log.events["rendered"] + self.log.events["attempt_failed"] + self.log.events["worker_lost"]
        return {
            "rows": dict(self.statuses),
            "utilisation": round(float(direct / total), 4),
            "makespan_s": round(self.pool.now_s, 1),
            "bound_s": round(self.bound_s, 1),
            "makespan_over_bound": round(self.pool.now_s / self.bound_s, 3),
            "waste_by_cause": {
                cause: round(float(cost / total), 5) for cause, cost in sorted(allocation.wasted.items())
            },
            "shared": round(float(allocation.shared / total), 4),
            "gpu_hours": round(float(total / USD_PER_GPU_S) / 3600, 1),
            "workers_lost": self.log.events["worker_lost"],
            "outcomes": num_outcomes,
            "cpu_ms_an_outcome": round(1e3 * self.driver_cpu_s / num_outcomes, 3),
        }


def check(night: Night) -> None:
    """1. every row has one result, rendered, but for poison and killers, which failed; 2. the ledger is the held time
    to the nanosecond, on each GPU without a gap; 3. what is charged to rows and shared is all of it."""
    assert night.ending.stopped_by is None
    ids = [row["id"] for row in night.ending.rows]
    assert len(ids) == len(set(ids)) == len(night.items)
    assert set(night.statuses) <= {"rendered", "failed"}
    harmful = {work.request.id for work in night.items if harm_of(work, night.pool.weather) is not None}
    assert {row["id"] for row in night.ending.rows if row["status"] == "failed"} == harmful
    assert night.log.written_gpu_s() == pytest.approx(night.pool.held_gpu_s(), rel=1e-9)
    allocation = night.allocation
    assert float(allocation.total / USD_PER_GPU_S) == pytest.approx(night.pool.held_gpu_s(), rel=1e-9)
    by_rows = sum((row.loaded for row in allocation.rows.values()), Decimal(0))
    assert float(by_rows) == pytest.approx(float(allocation.total), rel=1e-9)


def test_a_fleet_in_bad_weather_loses_no_row_and_little_time() -> None:
    night = Night(5_000, 60, 8, Weather(lost_every_s=8_000.0, preempted_every_s=8_000.0, hangs=0.002))
    report = night.report()
    print(json.dumps(report))  # noqa: T201 - shown when it fails
    check(night)
    assert report["workers_lost"] > 20 and {"WorkerLost", "Hang", "EngineFault"} <= set(report["waste_by_cause"])
    assert report["utilisation"] > 0.85 and report["makespan_over_bound"] < 1.45
    assert report["cpu_ms_an_outcome"] < 5


def test_without_weather_the_makespan_is_near_its_bound() -> None:
    calm = Weather(slow_groups=0, lost_every_s=1e12, preempted_every_s=1e12, hangs=0, poison=0, killers=0)
    night = Night(3_000, 50, 2, calm)
    check(night)
    assert night.report()["makespan_over_bound"] < 1.12 and night.statuses == {"rendered": 3_000}


def test_stragglers_are_raced_at_the_tail() -> None:
    """A twentieth of the groups is five times slower: the night ends within 1.3 times of one without them."""
    still = Weather(lost_every_s=1e12, preempted_every_s=1e12, hangs=0, poison=0, killers=0)
    slow, even = Night(3_000, 60, 1, still), Night(3_000, 60, 1, replace(still, slow_groups=0))
    check(slow)
    assert slow.pool.now_s <= 1.3 * even.pool.now_s
    assert 0 < slow.report()["waste_by_cause"]["duplicate"] < 0.05


@pytest.mark.long
def test_a_night_of_a_hundred_thousand_rows_over_a_thousand_groups_of_eight() -> None:
    night = Night(100_000, 1_000, 8, Weather())
    report = night.report()
    print(json.dumps(report))  # noqa: T201 - the figures of the README
    check(night)
    assert report["utilisation"] > 0.85 and report["makespan_over_bound"] < 1.3
    assert report["cpu_ms_an_outcome"] < 5, "the driver must keep up with 200 outcomes a second"
