"""Samplers against the reference's steps and loops, and the second-order ones against a solved equation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from pipeline.config.recipe import SAMPLERS as NAMES
from pipeline.engine import samplers
from pipeline.engine.latents import Tokens
from pipeline.engine.samplers import (
    SAMPLERS,
    Course,
    Prediction,
    ancestral_step,
    cfg_pp_step,
    euler_step,
    normalised_noise,
    res_2s_coefficients,
    sampler_named,
    sde_step,
)
from pipeline.engine.sigmas import NoiseStep, noise_steps
from pipeline.errors import UsageError

# Recorded loop -> sampler, eta.
LOOPS = {
    "euler": ("euler", 0.0),
    "gradient_estimation": ("euler_gradient", 0.0),
    "euler_ancestral": ("euler_ancestral", 1.0),
    "euler_cfg_pp": ("euler_cfg_pp", 1.0),
    "res2s": ("res_2s", 0.5),
}


@pytest.fixture(scope="module")
def steps_case(golden):
    return golden("schedulers/case_steps")


@pytest.fixture(scope="module")
def loops_case(golden):
    return golden("schedulers/case_loops")


def video(x_BTC):
    return Tokens(x_BTC, None)


@pytest.mark.parametrize("index", [0, 2, 5])
def test_euler_step_is_the_references(steps_case, index):
    step = noise_steps(steps_case["in.sigmas"].tolist())[index]
    state, clean = video(steps_case["in.sample"]), video(steps_case["in.denoised"])
    steps_case.assert_close(f"out.euler.step{index}", euler_step(state, clean, step).video_BTC)
    steps_case.assert_close(f"out.velocity.step{index}", (state.video_BTC - clean.video_BTC) / step.sigma)


# Step 5 ends at 0, where every ancestral sampler takes the clean prediction.
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_step_is_the_references(steps_case, index, eta):
    step = noise_steps(steps_case["in.sigmas"].tolist())[index]
    state, clean, noise = (video(steps_case[f"in.{name}"]) for name in ("sample", "denoised", "noise"))
    actual = ancestral_step(state, clean, step, eta, noise)
    steps_case.assert_close(f"out.euler_ancestral.eta{eta}.step{index}", actual.video_BTC)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cfg_pp_step_is_the_references(steps_case, index, eta):
    step = noise_steps(steps_case["in.sigmas"].tolist())[index]
    state, clean, negative, noise = (
        video(steps_case[f"in.{name}"]) for name in ("sample", "denoised", "uncond_denoised", "noise")
    )
    actual = cfg_pp_step(state, Prediction(clean, negative), step, eta, noise)
    steps_case.assert_close(f"out.euler_cfg_pp.eta{eta}.step{index}", actual.video_BTC)


@pytest.mark.parametrize("index", [0, 2])
def test_trap_20_renoised_step_of_res_2s_is_the_references(steps_case, index):
    step = noise_steps(steps_case["in.sigmas"].tolist())[index]
    state, end, noise = (video(steps_case[f"in.{name}"]) for name in ("sample", "denoised", "noise"))
    steps_case.assert_close(f"out.res2s_sde.eta0.5.step{index}", sde_step(state, end, step, 0.5, noise).video_BTC)


def test_coefficients_of_res_2s_are_the_references(steps_case):
    rows = [res_2s_coefficients(h) for h in steps_case["in.res2s_h"].tolist()]
    steps_case.assert_close("out.res2s_coefficients", torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("index", [0, 3, 5])
def test_ltx_video_step_is_euler_along_the_velocity_to_0_at_the_end(steps_case, index):
    levels = [*steps_case["in.ltxv.timesteps"].tolist(), 0.0]
    step = noise_steps(levels)[index]
    state, velocity = video(steps_case["in.sample"]), steps_case["in.denoised"]
    clean = video(state.video_BTC - step.sigma * velocity)
    steps_case.assert_close(f"out.ltxv.step_global{index}", euler_step(state, clean, step).video_BTC)


def test_ltx_video_step_is_a_tokens_own_where_timesteps_differ(steps_case):
    """Each token goes from its timestep to the next lower level; one at 0 stays."""
    state, velocity = steps_case["in.sample"], steps_case["in.denoised"]
    levels, expected = [*steps_case["in.ltxv.timesteps"].tolist(), 0.0], state.clone()
    for b, row in enumerate(steps_case["in.ltxv.token_timesteps"].tolist()):
        for t, sigma in enumerate(row):
            if sigma:
                x, v = video(state[b : b + 1, t : t + 1]), velocity[b : b + 1, t : t + 1]
                step = NoiseStep(sigma, max(level for level in levels if level < sigma - 1e-6))
                expected[b, t] = euler_step(x, video(x.video_BTC - sigma * v), step).video_BTC
    steps_case.assert_close("out.ltxv.step_per_token", expected)


class RecordedLoop:
    """The linear denoiser and the hold of the recorded loops, and their noise in the order it was drawn."""

    def __init__(self, case, eta):
        self.case = case
        self.start = Tokens(case["in.video"], case["in.audio"])
        self.num_draws = self.num_calls = 0
        steps = noise_steps(case["in.sigmas"].tolist())
        self.course = Course(steps, self.predict, self.hold, self.draw, eta)

    def predict(self, state, sigma):
        self.num_calls += 1
        clean, negative = (
            Tokens(*((1 - sigma / 2) * x + self.case[f"in.{bias}.{stream}"]
                     for stream, x in (("video", state.video_BTC), ("audio", state.audio_BTC))))
            for bias in ("bias", "uncond_bias")
        )  # fmt: skip
        return Prediction(self.hold(clean), negative)

    def hold(self, tokens):
        held, mask = self.case["in.video_clean"], self.case["in.video_denoise_mask"]
        x = tokens.video_BTC
        return Tokens(torch.lerp(held.to(x), x, mask.to(x)), tokens.audio_BTC)

    def draw(self, shape):
        noise = self.case[f"in.noise.{self.num_draws:02d}"]
        self.num_draws += 1
        assert tuple(noise.shape) == shape
        return noise


@pytest.mark.parametrize("name", LOOPS)
def test_loop_is_the_references(loops_case, name, monkeypatch):
    # The recorded noise is normalised already.
    monkeypatch.setattr(samplers, "normalised_noise", torch.Tensor.double)
    sampler, eta = LOOPS[name]
    loop = RecordedLoop(loops_case, eta)
    steps = list(SAMPLERS[sampler](loop.course, loop.start))
    assert len(steps) == 5
    assert loop.num_draws == len(loops_case.params["noise_draw_order"].get(name, []))
    loops_case.assert_close(f"out.{name}.video", steps[-1].state.video_BTC)
    loops_case.assert_close(f"out.{name}.audio", steps[-1].state.audio_BTC)


def test_trap_20_res_2s_looks_twice_a_step_and_once_more_and_ends_in_float32(loops_case):
    loop = RecordedLoop(loops_case, 0.5)
    *_, last = SAMPLERS["res_2s"](loop.course, loop.start)
    assert loop.num_calls == 2 * 5 + 1
    assert last.state.video_BTC.dtype == torch.float32


def test_trap_20_noise_of_res_2s_is_normalised_within_each_sample():
    noise = normalised_noise(torch.randn(2, 6, 5) * 3 + 1)
    assert noise.dtype == torch.float64
    torch.testing.assert_close(noise.mean(dim=(1, 2)), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(noise.std(dim=(1, 2)), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)


def _error(sampler, num_steps):
    """Of the end state for a normally distributed clean state, whose noise path is known in closed form."""
    mean, spread, first, last = 0.7, 0.3, 0.9, 0.1

    def level(sigma):
        return math.sqrt(((1 - sigma) * spread) ** 2 + sigma**2)

    def predict(state, sigma):
        gain = (1 - sigma) * spread**2 / level(sigma) ** 2
        clean = state.map(lambda x: mean + gain * (x - (1 - sigma) * mean))
        return Prediction(clean, clean)

    def state_at(sigma):
        return torch.tensor([[[(1 - sigma) * mean + 1.3 * level(sigma)]]], dtype=torch.float64)

    edges = [first + (last - first) * i / num_steps for i in range(num_steps + 1)]
    steps = [NoiseStep(a, b) for a, b in pairwise(edges)]
    course = Course(steps, predict, lambda tokens: tokens, lambda shape: torch.zeros(shape), 0.0)
    *_, end = SAMPLERS[sampler](course, video(state_at(first)))
    return float((end.state.video_BTC - state_at(last)).abs())


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1.0), ("dpmpp_2m", 2.0)])
def test_error_on_a_solved_equation_falls_with_the_samplers_order(sampler, order):
    coarse, fine = _error(sampler, 40), _error(sampler, 160)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.15)


def test_dpmpp_2m_starts_at_pure_noise_and_ends_at_the_clean_prediction():
    def predict(state, sigma):
        clean = state.map(lambda x: 0.5 * x + 0.1)
        return Prediction(clean, clean)

    steps = noise_steps([1.0, 0.8, 0.3, 0.0])
    course = Course(steps, predict, lambda tokens: tokens, torch.zeros, 0.0)
    *_, last = SAMPLERS["dpmpp_2m"](course, video(torch.ones(1, 2, 2)))
    assert torch.isfinite(last.state.video_BTC).all()
    torch.testing.assert_close(last.state.video_BTC, last.clean.video_BTC)


def test_every_neighbouring_pair_of_levels_is_a_step_in_float32():
    steps = noise_steps([1.0, 0.909375, 0.0])
    assert steps == [NoiseStep(1.0, 0.909375011920929), NoiseStep(0.909375011920929, 0.0)]


def test_unknown_sampler_is_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match=r"one of euler, .*, got 'heun'"):
        sampler_named("heun")
    assert sampler_named("euler") is SAMPLERS["euler"]


def test_the_samplers_a_recipe_may_name_are_those_that_exist():
    assert set(SAMPLERS) == set(NAMES)
