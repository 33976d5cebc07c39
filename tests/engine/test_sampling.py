"""Steps, the Euler sampler and the loop: against the reference, and in what they refuse."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import recipe as recipe_config
from pipeline.engine.components.text import TextContext
from pipeline.engine.denoise import denoise, denoising
from pipeline.engine.latents import Tokens
from pipeline.engine.samplers import SAMPLERS, euler, sampler_named
from pipeline.engine.sigmas import NoiseStep, noise_steps
from pipeline.errors import EngineFault, UsageError
from pipeline.geometry import LatentShape

SHAPE = LatentShape(1, 1, 2, 3, 24.0)


class ConstantVelocity:
    """A denoiser that always answers with one number, and counts what it is asked."""

    def __init__(self, value):
        self.value = value
        self.sigmas = []
        self.num_prepared = 0

    def prepare(self, video, audio):
        self.num_prepared += 1
        return "prepared"

    def __call__(self, video, audio, conditioning):
        assert conditioning == "prepared"
        assert video.text_mask_BS is None and audio.text_mask_BS is None
        assert torch.equal(video.sigma_B, audio.sigma_B)
        assert torch.equal(video.timesteps.per_token(2), video.sigma_B[:, None].expand(-1, 2))
        self.sigmas.append(float(video.sigma_B))
        return torch.full_like(video.tokens_BTC, self.value), torch.full_like(audio.tokens_BTC, self.value)


@pytest.fixture
def start():
    return Tokens(torch.ones(1, 2, 4), torch.ones(1, 3, 5))


@pytest.fixture
def text():
    return TextContext(torch.zeros(1, 128, 8), torch.zeros(1, 128, 8))


@pytest.mark.parametrize("index", [0, 2, 5])
def test_euler_step_is_the_references(golden, index):
    case = golden("schedulers/case_steps")
    step = noise_steps(case["in.sigmas"].tolist())[index]
    case.assert_close(f"out.euler.step{index}", euler(case["in.sample"], case["in.denoised"], step))


def test_every_neighbouring_pair_of_levels_is_a_step_in_float32():
    steps = noise_steps([1.0, 0.909375, 0.0])
    assert steps == [NoiseStep(1.0, 0.909375011920929), NoiseStep(0.909375011920929, 0.0)]


def test_last_step_ends_at_the_predicted_clean_tokens(start, text):
    last = list(denoising(ConstantVelocity(0.5), start, text, SHAPE, noise_steps([1.0, 0.5, 0.0]), euler))[-1]
    torch.testing.assert_close(last.state.video_BTC, last.clean.video_BTC)
    # A constant velocity moves by itself times the whole way, however the way is cut into steps.
    torch.testing.assert_close(last.state.audio_BTC, start.audio_BTC - 0.5)


def test_denoiser_is_asked_once_a_step_and_prepared_once_a_clip(start, text):
    denoiser = ConstantVelocity(0.0)
    denoise(denoiser, start, text, SHAPE, noise_steps([1.0, 0.75, 0.25, 0.0]), euler)
    assert denoiser.sigmas == [1.0, 0.75, 0.25]
    assert denoiser.num_prepared == 1


def test_state_stays_in_float32_when_the_denoiser_answers_in_bfloat16(start, text):
    class Rounded(ConstantVelocity):
        def __call__(self, video, audio, conditioning):
            return tuple(v.bfloat16() for v in super().__call__(video, audio, conditioning))

    state = denoise(Rounded(0.1), start, text, SHAPE, noise_steps([1.0, 0.5, 0.0]), euler)
    assert state.video_BTC.dtype == state.audio_BTC.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_a_fault(start, text, value):
    with pytest.raises(EngineFault, match="video latents"):
        denoise(ConstantVelocity(value), start, text, SHAPE, noise_steps([1.0, 0.0]), euler)


def test_unknown_sampler_is_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match="one of euler, got 'heun'"):
        sampler_named("heun")
    assert sampler_named("euler") is SAMPLERS["euler"]


def test_the_samplers_a_recipe_may_name_are_those_that_exist() -> None:
    assert set(SAMPLERS) == set(recipe_config.SAMPLERS)
