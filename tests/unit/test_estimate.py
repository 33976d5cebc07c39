"""Operation counts and quotes."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from jobs.entry import RenderJob, compose_job
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import ClipDefaults, DenoiserSize, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.geometry import PixelShape, latent_shape
from pipeline.planning.estimate import Estimator, clip_flops, denoiser_flops, quote
from pipeline.planning.spread import Machine
from pipeline.records.parallel import ParallelLayout
from pipeline.records.wishes import Wishes
from tests.unit.makers import parse

EXACT, FP8 = PrecisionConfig(), PrecisionConfig("fp8", linear="fp8")
FAST = compose_job(RenderJob, "render", ["precision=fast"]).precision
FULL = DenoiserSize(48, 4096, 2048, 1024, 2.39e10, 1.266e6)
RECIPE = RecipeConfig(
    "two_stage",
    ClipDefaults(),
    stages=[StageConfig(0.5, sigmas=[1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]),
            StageConfig(upsample=2.0, sigmas=[0.909375, 0.725, 0.421875, 0.0])],
)  # fmt: skip


@pytest.mark.parametrize(("height", "width", "tflop"), [(544, 960, 275.2), (1088, 1920, 1714.0)])
def test_a_pass_of_the_19b_denoiser_costs_what_an_operator_counter_says(height: int, width: int, tflop: float) -> None:
    """275.2 and 1,714 TFLOP were counted operator by operator on the published architecture."""
    shape = latent_shape(PixelShape(121, height, width, 24.0))
    assert denoiser_flops(FULL, shape) / 1e12 == pytest.approx(tflop, rel=0.002)


def test_a_distilled_1080p_clip_costs_7_3_pflop_of_denoising() -> None:
    request = parse(width=1920, height=1080, num_frames=121)
    rendered = 1920 * 1088 * 121
    total = clip_flops(request, RECIPE, FULL, EXACT)
    assert (total - 320e12 - 24.5e12) / 1e15 == pytest.approx(7.34, rel=0.005)
    assert FULL.decode_flops_per_pixel * rendered == pytest.approx(320e12, rel=0.001)


def test_an_enhanced_prompt_is_read_and_written_at_its_longest() -> None:
    request = parse(width=768, height=512)
    enhanced = replace(request, wishes=Wishes(enhance_prompt=True))
    extra = clip_flops(enhanced, RECIPE, FULL, EXACT) - clip_flops(request, RECIPE, FULL, EXACT)
    assert extra == pytest.approx((512 + 512) * FULL.text_flops_per_token)


def test_a_quote_sums_clips_and_prices_the_sum() -> None:
    price = UnitPrice("p", Decimal("3.6"))
    estimator = Estimator(FULL, Machine(400.0, 249.0), price)
    requests = [parse(i, width=768, height=512) for i in range(3)]
    total = quote([(r, estimator.estimate(r, RECIPE)) for r in requests], price)
    assert total.num_clips == 3
    assert float(total.cost_usd) == pytest.approx(total.gpu_seconds * 0.001, rel=1e-6)
    assert total.source == "uncalibrated"
    assert total.video_seconds == pytest.approx(3 * 25 / 24)


def test_guidance_costs_a_prediction_for_each_scale_that_is_not_void() -> None:
    request = parse(width=768, height=512)
    guided = StageConfig(
        schedule=ScheduleConfig(num_steps=10),
        guidance=[GuidanceConfig(video=StreamGuidance(cfg=3.0, stg=1.0), stg_blocks=[29])],
    )
    plain = StageConfig(schedule=ScheduleConfig(num_steps=10))
    fixed = FULL.text_flops_per_token * FULL.text_tokens + FULL.decode_flops_per_pixel * 25 * 512 * 768
    costs = [clip_flops(request, RecipeConfig("r", stages=[stage]), FULL, EXACT) - fixed for stage in (guided, plain)]
    assert costs[0] == pytest.approx(3 * costs[1])


def test_a_resized_recipe_decodes_only_what_its_last_stage_makes() -> None:
    """Two thirds of 768x512 on the grid of 32 px is 480x320 (511 rounds down), twice that 960x640."""
    size = DenoiserSize(1, 0, 0, 0, 0.0, 1.0)
    stages = [StageConfig(0.6666666, sigmas=[1.0, 0.0]), StageConfig(upsample=2.0, sigmas=[0.5, 0.0])]
    recipe = RecipeConfig("r", stages=stages, resize=True)
    assert recipe.stage_sizes(512, 768) == [(320, 480), (640, 960)]
    assert clip_flops(parse(width=768, height=512), recipe, size, EXACT) == 25 * 640 * 960


def test_the_longest_step_is_one_of_the_last_stage_at_1080p() -> None:
    estimator = Estimator(FULL, Machine(1000.0, 249.0), UnitPrice("p", Decimal(1)))
    estimate = estimator.estimate(parse(width=1920, height=1080, num_frames=121), RECIPE)
    assert estimate.longest_step_s == pytest.approx(1.714, rel=0.002)
    assert estimate.gpu_seconds == pytest.approx(7.68, rel=0.01)


def test_a_clip_on_four_gpus_is_sooner_done_and_costs_more() -> None:
    """xDiT takes 4.2 s on four GPUs for what takes diffusers 12.4 s on one, both compiled. Every GPU of the group pays
    for the encoding of the prompt; of 34 rows of the latent a rank decodes 9 at most."""
    estimator = Estimator(FULL, Machine(600.0, 249.0), UnitPrice("p", Decimal("3.6")))
    request = parse(width=1920, height=1080, num_frames=121)
    alone, four = (estimator.estimate(request, RECIPE, layout) for layout in (ParallelLayout(), ParallelLayout(4)))
    encoded_s, decoded_s = 24.5e12 / 600e12, 320e12 / 600e12
    speed_up = (alone.clip_s - encoded_s - decoded_s) / (four.clip_s - encoded_s - decoded_s * 9 / 34)
    assert speed_up == pytest.approx(12.4 / 4.2, rel=0.15)
    assert four.num_gpus == 4 and four.gpu_seconds == 4 * four.clip_s > alone.gpu_seconds
    assert four.cost_usd == pytest.approx(four.gpu_seconds * 0.001, rel=1e-6)
    assert four.longest_step_s < alone.longest_step_s and four.flops == alone.flops


def test_guidance_parallelism_shares_the_predictions_of_a_step() -> None:
    request = parse(width=768, height=512)
    guidance = [GuidanceConfig(video=StreamGuidance(cfg=3.0, stg=1.0), stg_blocks=[29])]
    recipe = RecipeConfig("r", stages=[StageConfig(schedule=ScheduleConfig(num_steps=10), guidance=guidance)])
    estimator = Estimator(replace(FULL, text_flops_per_token=0, decode_flops_per_pixel=0), Machine(600.0, 1e9),
                          UnitPrice("p", Decimal(1)))  # fmt: skip
    seconds = [estimator.estimate(request, recipe, ParallelLayout(guidance=degree)).clip_s for degree in (1, 2, 3)]
    assert [round(each / seconds[0], 2) for each in seconds] == [1.0, 0.67, 0.33], "3 predictions, then 2, then 1"


def test_a_group_decodes_a_picture_together_unless_it_has_too_few_rows() -> None:
    size = DenoiserSize(1, 0, 0, 0, 0.0, 1.0)
    estimator = Estimator(size, Machine(1.0, 249.0), UnitPrice("p", Decimal(1)))
    recipe = RecipeConfig("r", stages=[StageConfig(sigmas=[1.0, 0.0])])

    def decode_s(height: int, num_gpus: int) -> float:
        layout = ParallelLayout(guidance=num_gpus)
        request = replace(parse(width=768, height=height), grid_px=32)
        clip_s = estimator.estimate(request, recipe, layout).clip_s
        return clip_s / estimator.estimate(request, recipe).clip_s

    assert decode_s(512, 4) == pytest.approx(1 / 4), "16 rows"
    assert decode_s(512, 8) == pytest.approx(1 / 8), "2 rows each are enough"
    assert decode_s(448, 4) == pytest.approx(4 / 14), "4, 4, 3 and 3 rows"
    assert decode_s(448, 8) == 1, "14 rows are too few for 8 ranks, so each decodes the whole"


def test_the_fast_tier_is_estimated_with_the_operations_it_executes() -> None:
    """At 1920x1088x121 the first stage's steps up to 0.9875 and all of the second are sparse, in 46 of 48 layers: a
    block sees 18 of 64 blocks, and 64 of 255."""
    request = parse(width=1920, height=1080, num_frames=121)
    dense, fast = (clip_flops(request, RECIPE, FULL, precision) for precision in (EXACT, FAST))
    attention = [4 * 4096 * num_tokens**2 * 46 for num_tokens in (8_160, 32_640)]
    spared = [1 - 18 / 64 - 1 / 256, 1 - 64 / 255 - 1 / 256]
    assert dense - fast == pytest.approx(6 * attention[0] * spared[0] + 3 * attention[1] * spared[1])
    estimates = {
        precision.name: Estimator(FULL, Machine(600.0, 249.0), UnitPrice("p", Decimal("3.6")), precision).estimate(
            request, RECIPE, ParallelLayout(ulysses=2)
        )
        for precision in (EXACT, FP8, FAST)
    }
    assert estimates["fp8"] == estimates["exact"]
    assert estimates["fast"].flops == fast and estimates["exact"].flops == dense
    assert 0.75 < estimates["fast"].gpu_seconds / estimates["exact"].gpu_seconds < 0.85
    assert estimates["fast"].cost_usd < estimates["exact"].cost_usd


def test_the_fast_tier_spares_nothing_of_a_small_clip() -> None:
    request = parse(width=512, height=320, num_frames=25)
    assert clip_flops(request, RECIPE, FULL, FAST) == clip_flops(request, RECIPE, FULL, EXACT)
