"""The same batch on the same simulated GPUs: one GPU a clip, all GPUs of a node a clip, and each clip's own layout.

Estimates are those of LTX-2 19B, whose parallel efficiency is held to measured steps (`tests/unit/test_spread.py`);
driver, queue, chooser and balance run unchanged.
"""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest

from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import Ending, StopRequest
from pipeline.cluster.progress import Counts, Progress
from pipeline.config.model import DenoiserSize
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.planning.estimate import Estimator
from pipeline.planning.offers import Menu, layouts_up_to
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.planning.spread import Machine
from pipeline.records.outcome import RunFacts
from pipeline.records.work import Offer, WorkItem
from tests.simulation.fleet import SimulatedPool, Weather
from tests.simulation.test_fleet import CountingLog
from tests.unit.makers import FACTS, S, parse

LOAD_S = 20.0
CALM = Weather(load_s=LOAD_S, slow_groups=0, lost_every_s=1e12, preempted_every_s=1e12, hangs=0, poison=0, killers=0,
               jitter=0.02, load_jitter=0)  # fmt: skip
SIZE = DenoiserSize(text_flops_per_token=2.525e10, decode_flops_per_pixel=1.2656e6)
RECIPE = RecipeConfig("two_stage", stages=[
    StageConfig(0.5, sigmas=[1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]),
    StageConfig(upsample=2.0, sigmas=[0.909375, 0.725, 0.421875, 0.0]),
])  # fmt: skip
ESTIMATOR = Estimator(SIZE, Machine(600.0, 249.0), UnitPrice("p", Decimal(1)))
SMALL, FULL_HD, UHD = (768, 512, 121), (1920, 1088, 121), (3840, 2176, 121)
Clip = tuple[int, int, int]


def items(clips: Sequence[Clip], num_gpus: int, card_gb: float | None = None) -> list[WorkItem]:
    """With the offers of `parallel=auto` on nodes of `num_gpus`."""
    menu = Menu(layouts_up_to(num_gpus, SIZE), None if card_gb is None else card_gb * 1e9)
    offers: dict[Clip, tuple[Offer, ...]] = {}
    made = []
    for index, clip in enumerate(clips):
        width, height, num_frames = clip
        request = parse(index, width=width, height=height, num_frames=num_frames)
        if clip not in offers:
            offers[clip] = menu.offers(request, RECIPE, ESTIMATOR)
        first = next(offer for offer in offers[clip] if not offer.misfit)
        work = WorkItem(request, f"{index:064d}", first.estimate, layout=first.layout, offers=offers[clip])
        made.append(work)
    return made


def all_on(work: Sequence[WorkItem], num_gpus: int) -> list[WorkItem]:
    """Each on the best layout of so many GPUs, without a choice."""
    chosen = [next(o for o in each.offers if o.layout.num_gpus == num_gpus) for each in work]
    return [
        replace(each, layout=offer.layout, estimate=offer.estimate, offers=())
        for each, offer in zip(work, chosen, strict=True)
    ]


@dataclass
class Batch:
    """One simulated run."""

    makespan_s: float
    held_gpu_s: float
    ending: Ending

    @property
    def layouts(self) -> dict[str, int]:
        return dict(Counter(row["parallel"] for row in self.ending.rows))

    @property
    def reasons(self) -> set[str]:
        return {row["parallel_reason"] for row in self.ending.rows}


def run(work: Sequence[WorkItem], nodes: tuple[int, int], facts: RunFacts = FACTS, **admission: Any) -> Batch:
    num_nodes, gpus_per_node = nodes
    pool = SimulatedPool(num_nodes, gpus_per_node, CALM, random.Random(7))
    log = CountingLog()
    driver = Driver(
        queue=WorkQueue(work), pool=pool, log=log, facts=facts, admission=Admission(**admission),
        stop=StopRequest(), counts=Counts(len(work), 0, 0), progress=Progress(io.StringIO()),
        now_ns=pool.now_ns, flush_every_s=2.0,
    )  # fmt: skip
    ending = driver.drive()
    assert {row["status"] for row in ending.rows} == {"rendered"} and len(ending.rows) == len(work)
    assert log.written_gpu_s() == pytest.approx(pool.held_gpu_s(), rel=1e-9)
    makespan_s = max(row["finished_at"].timestamp() for row in ending.rows)
    return Batch(makespan_s, pool.held_gpu_s(), ending)


BATCHES: dict[str, list[Clip]] = {
    "many equal clips": [FULL_HD] * 96,
    "a few more clips than GPUs": [FULL_HD] * 10,
    "few clips": [FULL_HD] * 3,
    "one clip": [UHD],
    "a long tail": [UHD] * 2 + [SMALL] * 60,
    "mixed": [UHD] * 5 + [FULL_HD] * 20 + [SMALL] * 40,
}


@pytest.mark.parametrize("nodes", [(1, 8), (2, 4), (1, 4)], ids=["8 GPUs", "2 nodes of 4", "4 GPUs"])
@pytest.mark.parametrize("name", BATCHES)
def test_auto_ends_as_soon_as_the_better_of_one_gpu_and_all_gpus_a_clip(name: str, nodes: tuple[int, int]) -> None:
    work = items(BATCHES[name], nodes[1])
    alone, together, auto = run(all_on(work, 1), nodes), run(all_on(work, nodes[1]), nodes), run(work, nodes)
    figures = {
        way: (round(batch.makespan_s, 1), round(batch.held_gpu_s))
        for way, batch in {"one GPU": alone, "all GPUs": together, "auto": auto}.items()
    }
    print(json.dumps({"batch": name, "nodes": nodes, "s, GPU-s": figures, "auto": auto.layouts}))  # noqa: T201
    assert auto.makespan_s <= 1.02 * min(alone.makespan_s, together.makespan_s)


@pytest.mark.parametrize("nodes", [(1, 8), (2, 4)], ids=["8 GPUs", "2 nodes of 4"])
def test_clips_that_do_not_fit_one_card_are_spread_and_the_others_are_not(nodes: tuple[int, int]) -> None:
    large = [FULL_HD] * 12
    work = items(large + [SMALL] * 400, nodes[1], card_gb=42.0)
    auto, together = run(work, nodes), run(all_on(work, nodes[1]), nodes)
    narrowest = run([replace(each, offers=()) for each in work], nodes)
    ends = [round(batch.makespan_s, 1) for batch in (narrowest, together, auto)]
    print(json.dumps({"nodes": nodes, "fewest, all, auto": ends, "auto": auto.layouts}))  # noqa: T201
    assert ends[2] <= 1.02 * min(ends)
    num_gpus = {row["id"]: row["num_gpus"] for row in auto.ending.rows}
    assert all(num_gpus[f"row-{index}"] >= 2 for index in range(len(large)))
    assert Counter(num_gpus.values())[1] > 300
    assert any("GB do not fit one card of 42 GB" in reason for reason in auto.reasons)


def test_many_clips_are_rendered_on_one_gpu_each_and_the_rows_say_why() -> None:
    auto = run(items([FULL_HD] * 96, 8), (1, 8))
    assert auto.layouts == {"single": 96}
    assert "1 GPU: 96 clips wait for 8 GPUs" in auto.reasons


def test_a_deadline_is_met_with_more_gpus_where_one_would_miss_it() -> None:
    work = items([FULL_HD], 4)
    alone_s = work[0].estimate.clip_s
    hurried = run(work, (1, 4), deadline_ns=round((LOAD_S * 1.7 + alone_s / 2) * S))
    assert hurried.layouts == {"ulysses4": 1}
