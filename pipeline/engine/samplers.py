"""Samplers: from a noisy state down a list of steps. They know nothing of denoisers, text or guidance.

A recipe names its sampler. What a step asks of the denoiser is in `denoise.py`; all arithmetic here is on tokens, the
same for both streams.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.engine.latents import NoiseSource, Tokens
from pipeline.engine.sigmas import NoiseStep
from pipeline.errors import UsageError

# res_2s cannot step to 0 (its time is a logarithm): it goes to this level and looks once more.
LAST_RES_2S_LEVEL = 0.0011
RES_2S_SUBSTEP_ETA = 0.5
# Steps of res_2s below this logarithmic length and above this level are corrected for the noise they were given.
RES_2S_CORRECTED_LENGTH, RES_2S_CORRECTED_LEVEL = 0.5, 0.03
GRADIENT_GAIN = 2.0


@dataclass(frozen=True)
class Prediction:
    """Clean tokens the denoiser predicts.

    `clean` is guided, and held tokens are moved to what they are held to; `negative` is what the negative prompt alone
    predicts, the same as `clean` where there is no such prediction.
    """

    clean: Tokens
    negative: Tokens


@dataclass(frozen=True)
class StepResult:
    """What one step gave: the clean tokens the denoiser predicts, and the state the sampler moved to."""

    clean: Tokens
    state: Tokens


@dataclass(frozen=True)
class Course:
    """What a sampler is given besides its start.

    `predict` answers for a state and its noise level; `hold` moves a state's held tokens to what they are held to.
    `eta` is the part of each step's noise that is fresh.
    """

    steps: Sequence[NoiseStep]
    predict: Callable[[Tokens, float], Prediction]
    hold: Callable[[Tokens], Tokens]
    noise: NoiseSource
    eta: float

    def fresh_noise(self, like: Tokens) -> Tokens:
        """Standard normal, video drawn before audio."""
        return like.map(lambda x_BTC: self.noise(tuple(x_BTC.shape)).to(x_BTC.device))


# From the start, whose level is the first step's; yields every step in turn. All tensors are float32.
Sampler = Callable[[Course, Tokens], Iterator[StepResult]]


def euler(course: Course, state: Tokens) -> Iterator[StepResult]:
    """Straight along the velocity from the predicted clean state to this one."""
    for step in course.steps:
        clean = course.predict(state, step.sigma).clean
        state = euler_step(state, clean, step)
        yield StepResult(clean, state)


def euler_ancestral(course: Course, state: Tokens) -> Iterator[StepResult]:
    """Euler to below the next level, then up to it with fresh noise; for states that are (1-s) clean + s noise."""
    for step in course.steps:
        clean = course.predict(state, step.sigma).clean
        if step.next_sigma:
            state = course.hold(ancestral_step(state, clean, step, course.eta, course.fresh_noise(state)))
        else:
            state = clean
        yield StepResult(clean, state)


def euler_gradient(course: Course, state: Tokens) -> Iterator[StepResult]:
    """Euler along a velocity extrapolated from the step before (gradient estimation, arXiv 2306.04848)."""
    before: Tokens | None = None
    for step in course.steps:
        clean = course.predict(state, step.sigma).clean
        velocity = state.map(lambda x, d, s=step.sigma: (x - d) / s, clean)
        if before is not None and step.next_sigma:
            steered = velocity.map(lambda v, u: GRADIENT_GAIN * (v - u) + u, before)
            state = state.map(lambda x, v, s=step: x + v * (s.next_sigma - s.sigma), steered)
        else:
            state = euler_step(state, clean, step)
        before = velocity
        yield StepResult(clean, state)


def euler_cfg_pp(course: Course, state: Tokens) -> Iterator[StepResult]:
    """Ancestral Euler that keeps the guided clean state but the negative prompt's noise (CFG++, arXiv 2406.08070)."""
    for step in course.steps:
        prediction = course.predict(state, step.sigma)
        if step.next_sigma:
            state = course.hold(cfg_pp_step(state, prediction, step, course.eta, course.fresh_noise(state)))
        else:
            state = prediction.clean
        yield StepResult(prediction.clean, state)


def dpmpp_2m(course: Course, state: Tokens) -> Iterator[StepResult]:
    """DPM-Solver++ of second order over two steps (arXiv 2211.01095, algorithm 2).

    For states that are (1-s) clean + s noise its update is Euler's, with the clean state extrapolated by half the ratio
    of the steps' lengths in log((1-s)/s). The first step and one to 0 are of first order.
    """
    before: tuple[Tokens, float] | None = None
    for step in course.steps:
        clean = course.predict(state, step.sigma).clean
        length = _log_snr(step.next_sigma) - _log_snr(step.sigma)
        target = clean
        if before is not None and math.isfinite(length):
            ahead = length / (2 * before[1])
            target = clean.map(lambda d, e, k=ahead: d + k * (d - e), before[0])
        state = euler_step(state, target, step)
        before = (clean, length)
        yield StepResult(clean, state)


def res_2s(course: Course, state: Tokens) -> Iterator[StepResult]:
    """Exponential Runge-Kutta of second order in -log(s) (arXiv 2308.02157), with fresh noise at both evaluations.

    As LTX-2's HQ pipeline has it (release 1.2.0): in float64; the fresh noise normalised; where steps are short, the
    point a step starts from is moved so that the noisy midpoint lies on its line. The reference moves it by 100
    iterations of a contraction, here it is put at their fixed point.
    """
    *whole, last = course.steps
    if last.next_sigma == 0:
        last = NoiseStep(last.sigma, LAST_RES_2S_LEVEL)
    for step in (*whole, last):
        clean = course.predict(state, step.sigma).clean
        anchor, target = state.map(Tensor.double), clean.map(Tensor.double)
        h = math.log(step.sigma / step.next_sigma)
        half, first, second = res_2s_coefficients(h)
        middle = NoiseStep(step.sigma, math.sqrt(step.sigma * step.next_sigma))
        point = anchor.map(lambda x, d, k=h * half: x + k * (d - x), target)
        point = _renoised(course, anchor, point, middle, RES_2S_SUBSTEP_ETA)
        if h < RES_2S_CORRECTED_LENGTH and step.sigma > RES_2S_CORRECTED_LEVEL:
            anchor = point.map(lambda x, d, k=h * half: (x - k * d) / (1 - k), target)
        at_middle = course.predict(point.map(Tensor.float), middle.next_sigma).clean
        end = anchor.map(
            lambda x, d, e, a=h * first, b=h * second: x + a * (d - x) + b * (e - x),
            target,
            at_middle.map(Tensor.double),
        )
        state = _renoised(course, anchor, end, step, course.eta).map(Tensor.float)
        if step is not last or course.steps[-1].next_sigma:
            yield StepResult(at_middle, state)
    if course.steps[-1].next_sigma == 0:
        clean = course.predict(state, last.next_sigma).clean
        yield StepResult(clean, clean)


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_gradient": euler_gradient,
    "euler_cfg_pp": euler_cfg_pp,
    "dpmpp_2m": dpmpp_2m,
    "res_2s": res_2s,
}


def sampler_named(name: str) -> Sampler:
    """The sampler a recipe asks for; UsageError lists the names there are."""
    if name not in SAMPLERS:
        raise UsageError(f"recipe.stages.sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name]


def euler_step(state: Tokens, clean: Tokens, step: NoiseStep) -> Tokens:
    """One Euler step."""
    return state.map(lambda x, d: x + (x - d) / step.sigma * (step.next_sigma - step.sigma), clean)


def ancestral_step(state: Tokens, clean: Tokens, step: NoiseStep, eta: float, noise: Tokens) -> Tokens:
    """One ancestral step to a level above 0. The signal is scaled so that with the fresh noise the level is right."""
    down = step.next_sigma * (1 + (step.next_sigma / step.sigma - 1) * eta)
    scale = (1 - step.next_sigma) / (1 - down)
    fresh = math.sqrt(max(0.0, step.next_sigma**2 - (down * scale) ** 2))
    lower = euler_step(state, clean, NoiseStep(step.sigma, down))
    return lower.map(lambda x, n: scale * x + fresh * n, noise)


def cfg_pp_step(state: Tokens, prediction: Prediction, step: NoiseStep, eta: float, noise: Tokens) -> Tokens:
    """One CFG++ step to a level above 0. Levels divided by their signal are those of ancestral sampling."""
    signal, next_signal = 1 - step.sigma, 1 - step.next_sigma
    level = step.next_sigma / next_signal
    # A part of the old noise stays that falls to nothing where the state has no signal (level 1).
    kept = (level * signal / step.sigma) ** 2
    fresh = min(level, eta * level * math.sqrt(max(0.0, 1 - kept)))
    old = math.sqrt(level**2 - fresh**2)

    def stepped(x: Tensor, clean: Tensor, negative: Tensor, n: Tensor) -> Tensor:
        return next_signal * (clean + old * (x - signal * negative) / step.sigma + fresh * n)

    return state.map(stepped, prediction.clean, prediction.negative, noise)


def res_2s_coefficients(h: float) -> tuple[float, float, float]:
    """Weights of a step of length `h`: of the first prediction at the midpoint, and of both predictions at the end."""
    half = _phi_1(-h / 2) / 2
    second = 2 * _phi_2(-h)
    return half, _phi_1(-h) - second, second


def sde_step(state: Tokens, end: Tokens, step: NoiseStep, eta: float, noise: Tokens) -> Tokens:
    """A deterministic step's `end` with part of its noise replaced by fresh noise, at the same level."""
    fresh = min(step.next_sigma * eta, step.next_sigma * 0.9999)
    old = math.sqrt(step.next_sigma**2 - fresh**2)
    scale = 1 - step.next_sigma + old

    def renoised(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
        velocity = (x - y) / (step.sigma - step.next_sigma)
        return scale * (x - step.sigma * velocity + old / scale * velocity) + fresh * n

    return state.map(renoised, end, noise)


def normalised_noise(noise_BTC: Tensor) -> Tensor:
    """Mean 0 and spread 1 (unbiased) within each sample, in float64."""
    noise = noise_BTC.double()
    spread, mean = torch.std_mean(noise, dim=(-2, -1), keepdim=True)
    return (noise - mean) / spread


def _renoised(course: Course, start: Tokens, end: Tokens, step: NoiseStep, eta: float) -> Tokens:
    noise = course.fresh_noise(end).map(normalised_noise)
    return course.hold(sde_step(start, end, step, eta, noise))


def _log_snr(sigma: float) -> float:
    """log((1-s)/s), infinite at both ends."""
    if sigma in (0, 1):
        return -math.inf if sigma else math.inf
    return math.log((1 - sigma) / sigma)


def _phi_1(z: float) -> float:
    return math.expm1(z) / z


def _phi_2(z: float) -> float:
    return (math.expm1(z) - z) / z**2
