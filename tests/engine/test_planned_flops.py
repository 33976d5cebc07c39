"""What conf/model/nano.yaml tells the planner of operations outside the denoiser is what the nano parts need."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.ops import reference_ops
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import DenoiserSize
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.engine.components.text import TextContext
from pipeline.engine.components.text_encoder import REWRITE_INSTRUCTIONS, TextEncoder
from pipeline.engine.denoise import Scene, Texts, denoise
from pipeline.engine.engine import Brief
from pipeline.engine.latents import Tokens, seeded_noise
from pipeline.geometry import PixelShape, latent_shape
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.planning.estimate import REWRITE_READ_TOKENS, REWRITE_WRITTEN_TOKENS, denoiser_flops

NANO_YAML = Path(__file__).resolve().parents[2] / "conf" / "model" / "nano.yaml"


@pytest.fixture(scope="module")
def planned():
    return yaml.safe_load(NANO_YAML.read_text())["size"]


def _count(run):
    # The counter does not know the fused attention of the CPU; written out, attention is products like any other.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_planned_flops_of_a_text_token_are_those_of_encoder_and_connectors(engine, planned):
    measured = _count(lambda: engine.text.encode("a red fox")) / planned["text_tokens"]
    assert planned["text_flops_per_token"] == pytest.approx(measured, rel=0.1)


def test_planned_tokens_of_an_enhanced_prompt_leave_room_for_the_instructions_and_all_that_is_written():
    words_and_signs = len(re.findall(r"\w+|[^\w\s]", REWRITE_INSTRUCTIONS))
    assert words_and_signs + 200 <= REWRITE_READ_TOKENS
    assert inspect.signature(TextEncoder.rewrite).parameters["max_new_tokens"].default == REWRITE_WRITTEN_TOKENS


def test_planned_flops_of_a_pixel_are_those_of_the_video_decoder(engine, planned):
    pixels = PixelShape(num_frames=25, height=128, width=192, fps=24.0)
    shape = latent_shape(pixels)
    latent = torch.zeros(1, 16, shape.num_frames, shape.height, shape.width)
    measured = _count(lambda: engine.video_decoder.decode(latent))
    measured /= pixels.num_frames * pixels.height * pixels.width
    assert planned["decode_flops_per_pixel"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", ["guided", "res_2s"])
def test_planned_flops_of_a_guided_stage_are_those_of_its_predictions(engine, kind):
    """Within 10 %: what is done once a step and not once a token is left out, and shows at toy width."""
    guidance = [
        GuidanceConfig(0.5, StreamGuidance(cfg=3.0)),
        GuidanceConfig(0.0, StreamGuidance(cfg=3.0, stg=1.0, modality=3.0), stg_blocks=[1]),
    ]
    sampler = "res_2s" if kind == "res_2s" else "euler"
    stage = StageConfig(schedule=ScheduleConfig(num_steps=4), guidance=guidance, sampler=sampler)
    recipe = RecipeConfig(name="guided", stages=[stage])
    pixels = PixelShape(num_frames=25, height=256, width=384, fps=24.0)
    shape = latent_shape(pixels)
    texts = engine._texts("a red fox", recipe)
    measured = _count(lambda: engine.sample(Brief(texts, pixels), recipe, seeded_noise(1), lambda stage: None))
    size = DenoiserSize(num_layers=2, video_width=64, audio_width=32, text_tokens=128)
    samples = stage.num_samples(shape.num_video_tokens, has_audio=True)
    assert samples * denoiser_flops(size, shape) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(256, 384), (128, 192)])
def test_planned_flops_of_an_ltx_video_prediction_are_those_of_its_denoiser(fixtures, height, width):
    checkpoint = CheckpointFile(fixtures / "e2e_ltxv_0_9_8" / "checkpoint.safetensors")
    denoiser = load_denoiser(checkpoint, reference_ops(), "cpu")
    shape = latent_shape(PixelShape(num_frames=25, height=height, width=width, fps=24.0))
    stage = StageConfig(sigmas=[1.0, 0.0], family="ltx_video")
    texts = Texts(TextContext(torch.zeros(1, 16, 40), None, torch.ones(1, 16)))
    start = Tokens(torch.zeros(1, shape.num_video_tokens, 16), None)
    measured = _count(lambda: denoise(denoiser, start, Scene(shape, texts), stage, seeded_noise(1)))
    size = DenoiserSize(num_layers=3, video_width=64, audio_width=0, text_tokens=16)
    assert denoiser_flops(size, shape) == pytest.approx(measured, rel=0.1)
