"""A clip over several ranks is timed beside one, results compared first; who fails does not stop the others."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pipeline.bench.gang import gang_jobs, measure_gangs
from pipeline.bench.gang_entrants import KNOWN, default_for
from pipeline.bench.gang_job import GangJob
from pipeline.config.model import DenoiserSize, ModelConfig
from pipeline.engine.nano import CONFIG
from pipeline.errors import UsageError
from pipeline.geometry import LatentShape, PixelShape, latent_shape
from pipeline.records.parallel import ParallelLayout
from tests.distributed.gang_contestants import with_faults

NANO = ModelConfig(size=DenoiserSize(2, 64, 32, 128))
# Nine tokens, of which ranks have unequal parts; and four rows, which two ranks decode together.
ODD, TALL = (latent_shape(PixelShape(*size, 24.0)) for size in ((1, 96, 96), (9, 128, 64)))


def jobs(layouts: Sequence[str], contestants: Sequence[str] | None, **shapes: LatentShape) -> list[GangJob]:
    return gang_jobs(CONFIG, NANO, shapes, layouts, contestants, "cpu")


def assert_timed(facts: dict[str, Any], cosine: float) -> None:
    assert 0 < facts["min_s"] <= facts["median_s"] <= facts["max_s"] and len(facts["all_s"]) >= 6
    assert len(facts["alone"]["all_s"]) >= 6
    assert facts["speed_up"] == pytest.approx(facts["alone"]["median_s"] / facts["median_s"])
    for found in facts["against_alone"].values():
        assert found["cosine"] > cosine


@pytest.mark.timeout(240)
def test_contestants_over_two_ranks_are_compared_and_timed_beside_one() -> None:
    contestants = ["fp8", "exact", "xdit", "decode"]
    odd, tall = measure_gangs(jobs(["ulysses2"], contestants, odd=ODD, tall=TALL))
    assert (odd["shape"], odd["layout"], odd["num_gpus"], odd["num_tokens"]) == ("odd", "ulysses2", 2, 9)
    for row in (odd, tall):
        facts = row["contestants"]
        assert list(facts) == contestants
        assert "xDiT must have GPUs, got cpu" in facts["xdit"]["failure"]
        assert_timed(facts["exact"], 0.9999)
        assert_timed(facts["fp8"], 0.999)
        assert_timed(facts["decode"], 0.9999)
        assert facts["exact"]["difference"]["video"]["relative"] < 0.02
        assert facts["exact"]["weights_bytes"] == facts["exact"]["alone"]["weights_bytes"]
        assert facts["fp8"]["weights_bytes"] < facts["exact"]["weights_bytes"]
        assert "tflops_a_gpu" in facts["exact"] and "tflops_a_gpu" not in facts["decode"]
        assert row["exchanges"]["ulysses"]["median_s"] > 0


@pytest.mark.timeout(240)
def test_ranks_of_tensor_parallelism_hold_their_shares_of_the_same_numbers() -> None:
    (row,) = measure_gangs(jobs(["tensor2"], ["exact", "fp8", "fast"], odd=ODD))
    for name, facts in row["contestants"].items():
        assert_timed(facts, 0.999)
        assert facts["weights_bytes"] < 0.85 * facts["alone"]["weights_bytes"], name
    assert list(row["exchanges"]) == ["tensor"]


@pytest.mark.timeout(360)
def test_who_fails_says_why_and_the_others_are_timed() -> None:
    contestants = ("missing", "off", "raises", "dies", "exact")
    (job,) = jobs(["ulysses2"], ["exact"], odd=ODD)
    faulty = replace(job, contestants=contestants, entrants=with_faults, grace_s=2.0)
    (row,) = measure_gangs([faulty])
    facts = row["contestants"]
    assert facts["missing"]["failure"] in {f"rank {rank}: ImportError: no such library" for rank in range(2)}
    assert "must be within 0.05 of plain on one device, got 0.2" in facts["off"]["not_comparable"]
    assert "median_s" not in facts["off"]
    assert "rank 1: MemoryError: no room here; the others did not come to that" in facts["raises"]["failure"]
    assert "rank 1 ended with exit code 7" in facts["dies"]["failure"]
    assert "while dies was compared" in facts["dies"]["failure"]
    assert_timed(facts["exact"], 0.9999)
    assert not [process for process in multiprocessing.active_children() if "gang" in process.name]


@pytest.mark.timeout(120)
def test_ranks_that_give_no_sign_are_ended_and_nobody_is_measured() -> None:
    (job,) = jobs(["ulysses2"], ["exact"], odd=ODD, tall=TALL)
    rows = list(measure_gangs([replace(job, silence_s=0.0)]))
    assert [row["shape"] for row in rows] == ["odd", "tall"]
    for row in rows:
        assert "no rank gave a sign for 0 s" in row["contestants"]["exact"]["failure"]
    assert not [process for process in multiprocessing.active_children() if "gang" in process.name]


@pytest.mark.parametrize(
    ("layouts", "contestants", "message"),
    [
        (["ulysses2"], ["exact", "fastest"], "contestants must be of plain, exact, fp8, fast, decode, .*got fastest"),
        (["single"], None, "layouts must split one prediction, such as ulysses2, got single"),
        (["guidance2"], None, "got guidance2"),
        (["ulysses3"], None, "must divide the model's 4 heads, got 3"),
        (["ring16"], None, "got ring16 of 16 GPUs"),
        (["two"], None, "a layout must be named"),
    ],
)
def test_what_cannot_be_measured_is_refused(layouts: list[str], contestants: list[str] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        jobs(layouts, contestants, odd=ODD)


def test_xfuser_takes_part_by_default_where_it_can() -> None:
    assert {*default_for(ParallelLayout(ulysses=4)), "plain"} == set(KNOWN)
    assert default_for(ParallelLayout(ring=2)) == default_for(ParallelLayout(tensor=2)) == KNOWN[1:5]
