"""The engine, from hidden states of the text encoder to frames and sound, against the official pipelines' records."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.ops import reference_ops
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.engine.components.text import TextContext, TextStates
from pipeline.engine.conditions import append_tokens, hold_to
from pipeline.engine.denoise import Scene, Texts, denoise, denoising
from pipeline.engine.engine import Brief, Picture
from pipeline.engine.latents import (
    Tokens,
    add_noise,
    empty_tokens,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
)
from pipeline.geometry import PixelShape, latent_shape
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from tests.engine.golden_engine import engine_builder, recorded
from tests.engine.pictures import rgb_of


class RecordedStates:
    """A text encoder that says what the record's said."""

    def __init__(self, case):
        self.case = case

    def encode(self, prompts):
        suffix = "" if prompts == ["positive"] else "_negative"
        return TextStates(self.case[f"in.hidden_states{suffix}"], self.case[f"in.attention_mask{suffix}"])


def recorded_noise(case, names):
    return recorded([case[f"in.noise.{name}"] for name in names])


# Of scale; the records allow 1e-3.
BOUND = 5e-6
TWO_STAGES = ("stage1.video", "stage1.audio", "stage2.video", "stage2.audio")


@pytest.fixture(scope="module")
def engine_for(fixtures):
    build = engine_builder(fixtures / "e2e_ltx2_0", "spatial_upsampler.safetensors")
    return lambda case, draws: build(RecordedStates(case), lambda: recorded_noise(case, draws))


def guidance_of(case):
    params = case.params
    streams = {
        name: StreamGuidance(
            **{key.removesuffix("_scale"): x for key, x in params[f"{name}_guider"].items() if key != "stg_blocks"}
        )
        for name in ("video", "audio")
    }
    return GuidanceConfig(stg_blocks=params["video_guider"]["stg_blocks"], **streams)


def guided_recipe(case, *, recorded_levels=False, **stage):
    """With levels that the schedule computes, or the record's own.

    The two differ in the last bit, which timesteps times 1000 make 4e-5 of a guided clip: whatever else could be wrong
    is looked for under the record's.
    """
    if recorded_levels:
        stage["sigmas"] = case["in.sigmas"].tolist()
    else:
        stage["schedule"] = ScheduleConfig(num_steps=case.params["steps"])
    stages = [StageConfig(guidance=[guidance_of(case)], **stage)]
    return RecipeConfig(name="one_stage", negative_prompt="negative", stages=stages)


def assert_steps_are_recorded(case, steps, prefix=""):
    for index, progress in enumerate(steps):
        for kind, tokens in (("x0", progress.clean), ("next", progress.state)):
            case.assert_close(f"mid.{prefix}step{index}.video.{kind}", tokens.video_BTC, bound=BOUND)
            case.assert_close(f"mid.{prefix}step{index}.audio.{kind}", tokens.audio_BTC, bound=BOUND)


def assert_clip_is_recorded(case, engine, streams):
    frames = rgb_of(engine, streams)
    if "out.video_uint8" in case.tensors:
        expected = case["out.video_uint8"].numpy()
        assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
    else:
        assert frames.shape == tuple(case["out.video"].shape)
        assert np.abs(frames / 255 - case["out.video"].numpy()).max() <= 0.6 / 255
    case.assert_close("out.waveform", torch.from_numpy(streams.waveform))
    assert streams.sample_rate_hz == 600


class TestDistilledTwoStage:
    @pytest.fixture
    def case(self, golden):
        return golden("e2e_ltx2_0/case_distilled_two_stage_t2v")

    @pytest.fixture
    def engine(self, engine_for, case):
        return engine_for(case, TWO_STAGES)

    def test_contexts_are_the_references(self, engine, case):
        text = engine.text.encode("positive")
        case.assert_close("in.video_context", text.video_BSD)
        case.assert_close("in.audio_context", text.audio_BSD)

    @pytest.mark.parametrize(("stage", "side_px"), [(1, 64), (2, 128)])
    def test_trap_18_every_step_of_a_stage_is_the_references(self, engine, case, recipe, stage, side_px):
        shape = latent_shape(PixelShape(9, side_px, side_px, 24.0))
        if stage == 1:
            before = engine._empty(shape)
        else:
            before = Tokens(patchify_video(case["mid.upsampled"]), patchify_audio(case["mid.stage1.audio_latent"]))
        config = recipe.stages[stage - 1]
        noise = recorded_noise(case, [f"stage{stage}.video", f"stage{stage}.audio"])
        start = add_noise(before, noise, config.sigmas[0])
        scene = Scene(shape, Texts(engine.text.encode("positive")))
        steps = list(denoising(engine.denoiser, start, scene, config, noise))
        assert len(steps) == len(config.sigmas) - 1
        assert_steps_are_recorded(case, steps, f"stage{stage}.")

    def test_latents_between_the_stages_are_the_references(self, engine, case):
        case.assert_close("mid.upsampled", engine.upsampler.upsample(case["mid.stage1.video_latent"]))

    def test_latents_after_both_stages_are_the_references(self, engine, case, recipe):
        brief = Brief(Texts(engine.text.encode("positive")), PixelShape(9, 128, 128, 24.0))
        latents = engine.sample(brief, recipe, engine.noise_for(0), lambda stage: None)
        case.assert_close("out.video_latent", latents.video_BCFHW)
        case.assert_close("out.audio_latent", latents.audio_BCTM)

    def test_frames_and_sound_are_the_references(self, engine, case, recipe, request_for):
        request = request_for(prompt="positive", width=128, height=128)
        assert_clip_is_recorded(case, engine, engine.render(request, recipe, lambda stage: None))

    def test_the_first_stages_sound_can_ship(self, engine, case, recipe):
        recipe.sound_from_stage = 1
        brief = Brief(Texts(engine.text.encode("positive")), PixelShape(9, 128, 128, 24.0))
        latents = engine.sample(brief, recipe, engine.noise_for(0), lambda stage: None)
        case.assert_close("mid.stage1.audio_latent", latents.audio_BCTM)


class TestOneStageGuided:
    @pytest.fixture
    def case(self, golden):
        return golden("e2e_ltx2_0/case_one_stage_cfg_t2v")

    @pytest.fixture
    def engine(self, engine_for, case):
        return engine_for(case, ("video", "audio"))

    def test_trap_17_levels_are_the_references(self, case):
        levels = ScheduleConfig(num_steps=case.params["steps"]).levels(12)
        torch.testing.assert_close(torch.tensor(levels), case["in.sigmas"], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("batch_passes", [True, False])
    def test_trap_14_every_step_is_the_references_however_predictions_are_batched(self, engine, case, batch_passes):
        recipe = guided_recipe(case, recorded_levels=True, batch_passes=batch_passes)
        shape, noise = latent_shape(PixelShape(9, 64, 96, 24.0)), engine.noise_for(0)
        start = add_noise(engine._empty(shape), noise, 1.0)
        scene = Scene(shape, engine._texts("positive", recipe))
        steps = list(denoising(engine.denoiser, start, scene, recipe.stages[0], noise))
        assert len(steps) == case.params["steps"]
        assert_steps_are_recorded(case, steps)

    def test_frames_and_sound_are_the_references(self, engine, case, request_for):
        request = request_for(prompt="positive", width=96, height=64, grid_px=32)
        assert_clip_is_recorded(case, engine, engine.render(request, guided_recipe(case), lambda stage: None))


class TestDistilledTwoStageFromAPicture:
    @pytest.fixture
    def case(self, golden):
        return golden("e2e_ltx2_0/case_distilled_two_stage_i2v")

    @pytest.fixture
    def engine(self, engine_for, case):
        return engine_for(case, TWO_STAGES)

    @pytest.fixture
    def picture(self, case):
        sizes = {64: "stage1", 128: "stage2"}
        return Picture(lambda height, width: case[f"in.image.{sizes[height]}"])

    @pytest.mark.parametrize(("stage", "side_px"), [(1, 64), (2, 128)])
    def test_trap_16_every_step_of_a_stage_is_the_references(self, engine, case, recipe, picture, stage, side_px):
        shape = latent_shape(PixelShape(9, side_px, side_px, 24.0))
        config = recipe.stages[stage - 1]
        noise = recorded_noise(case, [f"stage{stage}.video", f"stage{stage}.audio"])
        if stage == 1:
            before = engine._empty(shape)
        else:
            before = Tokens(patchify_video(case["mid.upsampled"]), patchify_audio(case["mid.stage1.audio_latent"]))
        start = add_noise(before, noise, config.sigmas[0])
        hold = hold_to([engine._held(picture, shape, config, noise)], start, shape)
        start = Tokens(hold.blend(start.video_BTC), start.audio_BTC)
        scene = Scene(shape, Texts(engine.text.encode("positive")), hold)
        steps = list(denoising(engine.denoiser, start, scene, config, noise))
        assert len(steps) == len(config.sigmas) - 1
        assert_steps_are_recorded(case, steps, f"stage{stage}.")

    def test_frames_and_sound_are_the_references(self, engine, case, recipe, request_for, picture):
        request = request_for(prompt="positive", width=128, height=128)
        streams = engine.render(request, recipe, lambda stage: None, pictures=[picture])
        assert_clip_is_recorded(case, engine, streams)


class TestOneStageGuidedBetweenPictures:
    @pytest.fixture
    def case(self, golden):
        return golden("e2e_ltx2_0/case_one_stage_cfg_keyframes")

    @pytest.fixture
    def engine(self, engine_for, case):
        return engine_for(case, ("video", "audio"))

    @pytest.fixture
    def pictures(self, case):
        given = case.params["keyframe"]
        return [
            Picture(lambda height, width: case["in.image.first"], 0, given["first_frame_strength"]),
            Picture(
                lambda height, width: case["in.image.keyframe"], given["keyframe_frame_idx"], given["keyframe_strength"]
            ),
        ]

    @pytest.mark.parametrize("batch_passes", [True, False])
    def test_trap_19_every_step_is_the_references_with_the_appended_tokens(self, engine, case, pictures, batch_passes):
        recipe = guided_recipe(case, recorded_levels=True, batch_passes=batch_passes)
        stage = recipe.stages[0]
        shape, noise = latent_shape(PixelShape(9, 64, 96, 24.0)), engine.noise_for(0)
        start = add_noise(append_tokens(engine._empty(shape), 6), noise, 1.0)
        hold = hold_to([engine._held(picture, shape, stage, noise) for picture in pictures], start, shape)
        start = Tokens(hold.blend(start.video_BTC), start.audio_BTC)
        scene = Scene(shape, engine._texts("positive", recipe), hold)
        steps = list(denoising(engine.denoiser, start, scene, stage, noise))
        assert len(steps) == case.params["steps"]
        assert_steps_are_recorded(case, steps)

    def test_frames_and_sound_are_the_references(self, engine, case, request_for, pictures):
        request = request_for(prompt="positive", width=96, height=64, grid_px=32)
        streams = engine.render(request, guided_recipe(case), lambda stage: None, pictures=pictures)
        assert_clip_is_recorded(case, engine, streams)


def test_guided_latents_of_ltx_2_3_are_the_references(golden, fixtures):
    case = golden("e2e_ltx2_3/case_one_stage_cfg_t2v")
    folder, file = case.params["checkpoint"].split("/")
    denoiser = load_denoiser(CheckpointFile(fixtures / folder / file), reference_ops(), "cpu")
    shape, noise = latent_shape(PixelShape(9, 64, 96, 24.0)), recorded_noise(case, ("video", "audio"))
    texts = [
        TextContext(case[f"in.video_context{suffix}"], case[f"in.audio_context{suffix}"])
        for suffix in ("", "_negative")
    ]
    start = add_noise(empty_tokens(shape, video_channels=16, audio_channels=32, device="cpu"), noise, 1.0)
    end = denoise(
        denoiser, start, Scene(shape, Texts(*texts)), guided_recipe(case, recorded_levels=True).stages[0], noise
    )
    case.assert_close("out.video_latent", unpatchify_video(end.video_BTC, shape), bound=BOUND)
    case.assert_close("out.audio_latent", unpatchify_audio(end.audio_BTC, 16), bound=BOUND)
