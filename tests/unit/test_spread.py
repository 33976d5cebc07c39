"""Seconds of a prediction on a layout, against what others measured and what must hold of any machine."""

from __future__ import annotations

import pytest

from pipeline.config.cluster import ClusterConfig
from pipeline.config.model import DenoiserSize
from pipeline.geometry import LatentShape, PixelShape, latent_shape
from pipeline.planning.estimate import denoiser_flops
from pipeline.planning.spread import Machine, prediction_s
from pipeline.records.parallel import ParallelLayout

FULL = DenoiserSize()
SMALL, LARGE = (latent_shape(PixelShape(121, height, width, 24.0)) for height, width in ((544, 960), (1088, 1920)))
LINK = ClusterConfig().assumed_link_gb_per_s
# Seconds of one step of LTX-2 19B, repeated blocks compiled, on H200 with NVLink: diffusers 0.42.1 on one GPU, xDiT
# 0.7.0 (Ulysses) on two and four.
MEASURED = ((SMALL, 0.486, {2: 0.287, 4: 0.183}), (LARGE, 2.825, {2: 1.581, 4: 0.912}))


@pytest.mark.parametrize("num_gpus", [2, 4])
@pytest.mark.parametrize(("shape", "alone_s", "measured"), MEASURED, ids=["8160 tokens", "32640 tokens"])
def test_steps_on_two_and_four_gpus_are_predicted_within_15_percent(
    shape: LatentShape, alone_s: float, measured: dict[int, float], num_gpus: int
) -> None:
    machine = Machine(denoiser_flops(FULL, shape) / alone_s / 1e12, LINK)
    assert prediction_s(FULL, shape, ParallelLayout(), machine) == pytest.approx(alone_s)
    assert prediction_s(FULL, shape, ParallelLayout(ulysses=num_gpus), machine) == pytest.approx(
        measured[num_gpus], rel=0.15
    )


def test_the_parts_that_layouts_divide_are_all_operations_of_a_prediction() -> None:
    for size in (FULL, DenoiserSize(28, 2048, 0, 256)):
        alone_s = prediction_s(size, LARGE, ParallelLayout(), Machine(1.0, LINK))
        assert alone_s * 1e12 == pytest.approx(denoiser_flops(size, LARGE))


@pytest.mark.parametrize("layout", ["ulysses2", "ring2", "tensor2", "ulysses4", "ring2_ulysses2", "ulysses2_tensor2"])
def test_more_gpus_are_faster_for_a_large_clip_and_cost_more_gpu_seconds_for_any(layout: str) -> None:
    machine = Machine(600.0, LINK)
    for shape in (SMALL, LARGE):
        alone_s = prediction_s(FULL, shape, ParallelLayout(), machine)
        spread = ParallelLayout.named(layout)
        spread_s = prediction_s(FULL, shape, spread, machine)
        assert alone_s / spread.num_gpus < spread_s < alone_s


def test_tensor_parallelism_moves_more_than_ulysses_and_a_slow_link_makes_both_useless() -> None:
    ulysses, tensor = ParallelLayout(ulysses=4), ParallelLayout(tensor=4)
    fast, slow = Machine(600.0, LINK), Machine(600.0, 1.0)
    assert prediction_s(FULL, LARGE, ulysses, fast) < prediction_s(FULL, LARGE, tensor, fast)
    alone_s = prediction_s(FULL, LARGE, ParallelLayout(), slow)
    assert min(prediction_s(FULL, LARGE, layout, slow) for layout in (ulysses, tensor)) > alone_s


def test_few_tokens_gain_nothing_from_more_gpus() -> None:
    shape = latent_shape(PixelShape(9, 64, 64, 24.0))
    machine = Machine(600.0, LINK)
    assert prediction_s(FULL, shape, ParallelLayout(ulysses=4), machine) > 0.8 * prediction_s(
        FULL, shape, ParallelLayout(), machine
    )
