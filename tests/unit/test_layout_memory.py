"""What a clip takes of each GPU of a group."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.planning.memory import bytes_on_a_gpu, demands, denoiser_bytes
from pipeline.records.parallel import ParallelLayout
from tests.unit.makers import parse

FULL, BF16 = DenoiserSize(), PrecisionConfig()
RECIPE = RecipeConfig("one", stages=[StageConfig(sigmas=[1.0, 0.0])])
LARGE = replace(parse(width=3840, height=2176, num_frames=257), grid_px=32)


def gb(layout: str, recipe: RecipeConfig = RECIPE) -> float:
    return bytes_on_a_gpu(LARGE, recipe, FULL, BF16, ParallelLayout.named(layout)) / 1e9


def test_the_weights_of_the_blocks_are_those_of_the_published_model_but_for_its_tables() -> None:
    assert denoiser_bytes(FULL, BF16) == pytest.approx(2 * 18_876_174_592, rel=0.025)
    fp8 = PrecisionConfig(linear="fp8")
    assert denoiser_bytes(FULL, fp8) == pytest.approx(denoiser_bytes(FULL, BF16) * (6 + 42 / 2) / 48)


def test_sequence_parallelism_divides_activations_and_tensor_parallelism_weights_too() -> None:
    weights_gb, text_gb = denoiser_bytes(FULL, BF16) / 1e9, 48 * 2 * 1024 * (4096 + 2048) * 2 / 1e9
    whole_gb = weights_gb + text_gb
    assert gb("ulysses4") - whole_gb == pytest.approx((gb("single") - whole_gb) / 4, rel=0.02)
    assert gb("ring2_ulysses2") == gb("ulysses4")
    assert weights_gb / 2 < gb("tensor2") < gb("ulysses2")
    assert gb("ulysses2_tensor2") < gb("tensor2")


def test_guidance_parallelism_divides_the_samples_of_a_call() -> None:
    guidance = [GuidanceConfig(video=StreamGuidance(cfg=3.0))]
    guided = RecipeConfig("guided", stages=[StageConfig(sigmas=[1.0, 0.0], guidance=guidance)])
    assert gb("guidance2", guided) == gb("single") < gb("single", guided)


def test_demands_of_a_layout_are_those_of_its_fullest_gpu() -> None:
    (alone,), (spread,) = (
        demands([(LARGE, RECIPE)], FULL, element_bytes=2, layout=layout)
        for layout in (ParallelLayout(), ParallelLayout(ulysses=4))
    )
    assert spread["denoise"] < alone["denoise"] / 3
    assert {name: spread[name] for name in ("text_encode", "upsample", "decode")} == {
        name: alone[name] for name in ("text_encode", "upsample", "decode")
    }
