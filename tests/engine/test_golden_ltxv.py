"""LTX-Video through the same engine, from text embeddings to frames, against the official pipelines' records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from jobs.entry import compose_recipes
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.engine.components.text import TextStates
from pipeline.engine.denoise import Scene, denoising
from pipeline.engine.engine import Brief, Picture
from pipeline.engine.latents import add_noise, seeded_noise, unpatchify_video
from pipeline.geometry import PixelShape, latent_shape
from pipeline.telemetry import ignore_steps
from tests.engine.golden_engine import engine_builder, recorded
from tests.engine.pictures import rgb_of

# Of scale; the records allow 1e-3.
BOUND = 5e-6


class RecordedStates:
    """A text encoder that says what the record's said."""

    def __init__(self, case):
        self.case = case

    def encode(self, prompts):
        kind = "prompt" if prompts == ["positive"] else "negative_prompt"
        return TextStates(self.case[f"in.{kind}_embeds"][..., None], self.case[f"in.{kind}_attention_mask"])


def recorded_draws(case):
    """The record's random numbers in the order in which the reference drew them."""
    names = sorted((name for name in case.tensors if name.startswith("in.draw.")), key=lambda name: name.split(".")[2])
    return recorded(case[name] for name in names)


@pytest.fixture(scope="module")
def engine_for(fixtures):
    build = engine_builder(fixtures / "e2e_ltxv_0_9_8", "spatial_upscaler.safetensors")
    return lambda case: build(RecordedStates(case), lambda: recorded_draws(case))


def frames_of(engine, *what, **pictures):
    streams = engine.render(*what, lambda stage: None, **pictures)
    assert streams.waveform is None and streams.sample_rate_hz is None
    return rgb_of(engine, streams).astype(int)


class TestDevInOnePass:
    @pytest.fixture
    def case(self, golden):
        return golden("e2e_ltxv_0_9_8/case_single_pass_dev_t2v")

    @pytest.fixture
    def recipe(self, case):
        given = case.params
        # The reference takes a rescaling scale of 1 for none.
        entries = zip(
            given["guidance_timesteps"], given["guidance_scale"], given["stg_scale"], given["rescaling_scale"],
            given["skip_block_list"], strict=True,
        )  # fmt: skip
        guidance = [
            GuidanceConfig(level, StreamGuidance(cfg=cfg, stg=stg, rescale=rescale % 1), stg_blocks=blocks)
            for level, cfg, stg, rescale, blocks in entries
        ]
        schedule = ScheduleConfig(num_steps=given["num_inference_steps"], num_tokens=0)
        stage = StageConfig(schedule=schedule, family="ltx_video", guidance=guidance, cfg_star=True)
        return RecipeConfig(name="dev", negative_prompt="negative", stages=[stage])

    def test_trap_28_levels_are_for_the_clips_tokens(self, case, recipe):
        levels = recipe.stages[0].levels(2 * 2 * 3)
        torch.testing.assert_close(torch.tensor(levels[:-1]), case["out.timesteps"], atol=1e-6, rtol=0)
        assert levels[-1] == 0

    @pytest.mark.parametrize("batch_passes", [True, False])
    def test_trap_28_every_step_is_the_references(self, engine_for, case, recipe, batch_passes):
        # Under the record's own levels: the computed ones differ in the last bit, which shows in the fifth digit.
        stage = replace(recipe.stages[0], schedule=None, sigmas=[*case["out.timesteps"].tolist(), 0.0])
        engine, stage.batch_passes = engine_for(case), batch_passes
        shape, noise = latent_shape(PixelShape(9, 64, 96, 30.0)), recorded_draws(case)
        start = before = add_noise(engine._empty(shape), noise, 1.0)
        scene, levels = Scene(shape, engine._texts("positive", recipe)), stage.levels(shape.num_video_tokens)
        for index, step in enumerate(denoising(engine.denoiser, start, scene, stage, noise)):
            velocity = (before.video_BTC - step.clean.video_BTC) / levels[index]
            case.assert_close(f"mid.step{index}.velocity", velocity, bound=BOUND)
            case.assert_close(f"mid.step{index}.next", step.state.video_BTC, bound=BOUND)
            before = step.state
        assert index == 5
        case.assert_close("out.latent", unpatchify_video(before.video_BTC, shape), bound=BOUND)

    def test_frames_are_the_references(self, engine_for, case, recipe, request_for):
        request = request_for(prompt="positive", width=96, height=64, grid_px=32, fps=30.0)
        frames = frames_of(engine_for(case), request, recipe)
        expected = case["out.video"][0].permute(1, 2, 3, 0).numpy()
        assert np.abs(frames / 255 - expected).max() <= 0.6 / 255


class TestDistilledMultiScale:
    @pytest.fixture(params=["t2v", "i2v"])
    def case(self, golden, request):
        return golden(f"e2e_ltxv_0_9_8/case_multi_scale_distilled_{request.param}")

    @pytest.fixture
    def recipe(self, case):
        first, second = (case.params[f"{name}_pass"]["timesteps"] for name in ("first", "second"))
        return RecipeConfig(
            name="multi_scale",
            resize=True,
            stages=[
                StageConfig(case.params["downscale_factor"], sigmas=[*first, 0.0], family="ltx_video"),
                StageConfig(upsample=2.0, adain=1.0, sigmas=[*second, 0.0], family="ltx_video"),
            ],
        )

    @pytest.fixture
    def pictures(self, case):
        if "in.image" not in case.tensors:
            return ()

        def at_size(height, width):
            resized = functional.interpolate(case["in.image"][:, :, 0], (height, width), mode="bilinear")
            return resized[:, :, None]

        return (Picture(at_size, 0, case.params["conditioning_strength"]),)

    def test_trap_28_first_pass_is_two_thirds_rounded_down(self, case, recipe):
        assert recipe.stage_sizes(96, 192) == [(32, 96), (64, 192)]

    def test_latents_of_the_first_pass_and_between_are_the_references(self, engine_for, case, recipe, pictures):
        engine, first = engine_for(case), recipe.stages[0]
        shape = latent_shape(PixelShape(9, 32, 96, 25.0))
        brief = Brief(engine._texts("positive", recipe), PixelShape(9, 96, 192, 25.0), pictures=pictures)
        tokens = engine._denoised(engine._empty(shape), shape, first, brief, recorded_draws(case), ignore_steps)
        latent = unpatchify_video(tokens.video_BTC, shape)
        case.assert_close("mid.first_pass_latent", latent, bound=BOUND)
        # Recorded before its statistics are adapted; that shows in the frames.
        case.assert_close("mid.upsampled", engine.upsampler.upsample(latent), bound=BOUND)

    def test_frames_are_the_references(self, engine_for, case, recipe, pictures, request_for):
        request = request_for(prompt="positive", width=192, height=96, grid_px=32, fps=25.0)
        frames = frames_of(engine_for(case), request, recipe, pictures=pictures)
        expected = case["out.video_uint8"][0].permute(1, 2, 3, 0).numpy().astype(int)
        assert frames.shape == expected.shape
        assert np.abs(frames - expected).max() <= 1
        recipe.stages[1].adain = 0.0
        other = frames_of(engine_for(case), request, recipe, pictures=pictures)
        assert np.abs(other - expected).max() > 1, "the adapted statistics are part of what is compared"


@pytest.mark.parametrize("name", ["ltxv_multi_scale_dev", "ltxv_multi_scale_distilled", "ltxv_one_pass"])
def test_shipped_recipe_renders_on_a_tiny_model(engine_for, golden, request_for, name):
    """With the last of the tiny model's three blocks where the recipe perturbs those of a published one."""
    recipe = compose_recipes("render", []).usable[name]
    for stage in recipe.stages:
        for guidance in stage.guidance:
            guidance.stg_blocks = [2 for _ in guidance.stg_blocks]
    case = golden("e2e_ltxv_0_9_8/case_single_pass_dev_t2v")
    engine = replace(engine_for(case), noise_for=seeded_noise)
    request = request_for(prompt="positive", width=190, height=96, grid_px=recipe.grid_px)
    assert recipe.grid_px == 32
    frames = frames_of(engine, request, recipe)
    assert frames.shape == (9, 96, 190, 3) and frames.std() > 1
