"""The sampling loop: a function of denoiser, start, text, stage and noise. Knows no prompt, file or size in pixels.

What a step asks of the denoiser is made here: tokens, their timesteps, one sample for each prediction that guidance
needs. What outlasts a step (rotary tables, projected text) is computed once a call. How the steps follow each other is
in `samplers.py`, how predictions are combined in `guidance.py`.

Shapes: B batch (1), T tokens, C channels, P predictions of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pipeline.config.guidance import ISOLATED, LEVEL_SLACK, NEGATIVE, PERTURBED, GuidanceConfig
from pipeline.config.recipe import StageConfig
from pipeline.engine.components.text import TextContext
from pipeline.engine.conditions import Hold
from pipeline.engine.guidance import guided
from pipeline.engine.latents import NoiseSource, Tokens, audio_positions, video_positions
from pipeline.engine.samplers import Course, Prediction, StepResult, sampler_named
from pipeline.engine.sigmas import noise_steps
from pipeline.errors import EngineFault
from pipeline.geometry import LatentShape
from pipeline.model.denoiser import Denoiser
from pipeline.model.streams import Conditioning, DistinctTimesteps, Perturbation, SkipStrategy, TokenStream
from pipeline.telemetry import OnStep, ignore_steps

UNGUIDED = GuidanceConfig()

# Of video and audio, (1,T,C) float32 each.
Velocities = tuple[Tensor, Tensor | None]
PassSpread = Callable[[Sequence[str], Callable[[Sequence[str]], list[Velocities]]], list[Velocities]]
"""(names of a step's predictions, what computes those of some names) -> those of all names, in their order."""


def compute_all(names: Sequence[str], compute: Callable[[Sequence[str]], list[Velocities]]) -> list[Velocities]:
    """Nothing is left to other processes."""
    return compute(names)


@dataclass(frozen=True)
class Texts:
    """What the denoiser attends to; `negative` only where a stage is guided by it."""

    positive: TextContext
    negative: TextContext | None = None


@dataclass(frozen=True)
class Scene:
    """What is denoised, besides the tokens: the same for every step of a stage."""

    shape: LatentShape
    texts: Texts
    hold: Hold | None = None


def denoise(
    denoiser: Denoiser,
    start: Tokens,
    scene: Scene,
    stage: StageConfig,
    noise: NoiseSource,
    on_step: OnStep = ignore_steps,
    spread: PassSpread = compute_all,
) -> Tokens:
    """The state after all steps, each of which is told to `on_step`. EngineFault if it is not finite."""
    state = start
    num_steps = len(noise_steps(stage.levels(scene.shape.num_video_tokens)))
    for step, progress in enumerate(denoising(denoiser, start, scene, stage, noise, spread), start=1):
        state = progress.state
        on_step("denoise", step, num_steps)
    for name, tokens_BTC in (("video", state.video_BTC), ("audio", state.audio_BTC)):
        # Looked at once a stage, not once a step: on an accelerator looking means waiting.
        if tokens_BTC is not None and not bool(torch.isfinite(tokens_BTC).all()):
            raise EngineFault(f"the denoiser gave {name} latents that are not finite numbers after the stage's steps")
    return state


def denoising(
    denoiser: Denoiser,
    start: Tokens,
    scene: Scene,
    stage: StageConfig,
    noise: NoiseSource,
    spread: PassSpread = compute_all,
) -> Iterator[StepResult]:
    """Every step in turn, from `start`, whose noise level is the first step's. Arithmetic between calls is float32."""
    predictor = Predictor(denoiser, scene, stage, spread)
    steps = noise_steps(stage.levels(scene.shape.num_video_tokens))
    course = Course(steps, predictor.predict, predictor.hold, noise, stage.eta)
    return sampler_named(stage.sampler)(course, start)


class Predictor:
    """Asks the denoiser for every prediction that the guidance at a noise level needs, and combines them."""

    def __init__(self, denoiser: Denoiser, scene: Scene, stage: StageConfig, spread: PassSpread = compute_all) -> None:
        self._spread = spread
        self._denoiser = denoiser
        self._scene = scene
        self._stage = stage
        self._device = scene.texts.positive.video_BSD.device
        video_positions_B3T2 = video_positions(scene.shape, device=self._device)
        self._video_positions_B3T2 = video_positions_B3T2 if scene.hold is None else scene.hold.positions_B3T2
        self._audio_positions_B1T2 = audio_positions(scene.shape, device=self._device)
        # By which of a call's samples have the negative prompt: nothing else of them outlasts a step.
        self._conditioning: dict[tuple[bool, ...], Conditioning] = {}
        # A hold's few distinct values are found once, because finding them waits for the accelerator.
        self._freedom = None if scene.hold is None else DistinctTimesteps.from_tokens(scene.hold.mask_BT)

    def predict(self, state: Tokens, sigma: float) -> Prediction:
        """The clean tokens of `state` at noise level `sigma`, guided, and moved to what they are held to."""
        guidance = self._stage.guidance_at(sigma) or UNGUIDED
        passes = guidance.passes(has_audio=state.audio_BTC is not None)

        def compute(names: Sequence[str]) -> list[Velocities]:
            calls = [names] if self._stage.batch_passes else [(name,) for name in names]
            return [velocity for call in calls for velocity in self._velocities(call, guidance, state, sigma)]

        velocities = {
            name: Tokens(*velocity) for name, velocity in zip(passes, self._spread(passes, compute), strict=True)
        }
        if self._stage.family == "ltx_video":
            clean = self._clean(state, self._combined(velocities, guidance), sigma)
            return Prediction(clean, clean)
        cleans = {name: self._clean(state, velocity, sigma) for name, velocity in velocities.items()}
        clean = self.hold(self._combined(cleans, guidance))
        return Prediction(clean, cleans.get(NEGATIVE, clean))

    def hold(self, tokens: Tokens) -> Tokens:
        """`tokens` moved to what they are held to."""
        if self._scene.hold is None:
            return tokens
        return Tokens(self._scene.hold.blend(tokens.video_BTC), tokens.audio_BTC)

    def _combined(self, predictions: dict[str, Tokens], guidance: GuidanceConfig) -> Tokens:
        video = {name: tokens.video_BTC for name, tokens in predictions.items()}
        audio = {name: tokens.audio_BTC for name, tokens in predictions.items() if tokens.audio_BTC is not None}
        return Tokens(
            guided(video, guidance.video, cfg_star=self._stage.cfg_star),
            guided(audio, guidance.audio, cfg_star=self._stage.cfg_star) if audio else None,
        )

    def _clean(self, state: Tokens, velocity: Tokens, sigma: float) -> Tokens:
        """State minus timestep times velocity, token by token."""
        uniform = state.map(lambda x_BTC, v_BTC: x_BTC - sigma * v_BTC, velocity)
        if self._freedom is None:
            return uniform
        num_tokens = state.video_BTC.shape[1]
        timesteps_BT1 = self._timesteps(1, sigma).per_token(num_tokens)[..., None]
        video_BTC = state.video_BTC - timesteps_BT1 * velocity.video_BTC
        if self._stage.family == "ltx_video":
            # A held token stands still until the level has fallen to its own: until then it is its own clean state.
            moves_BT1 = self._freedom.per_token(num_tokens)[..., None] > sigma - LEVEL_SLACK
            video_BTC = torch.where(moves_BT1, video_BTC, state.video_BTC)
        return Tokens(video_BTC, uniform.audio_BTC)

    def _timesteps(self, num_samples: int, sigma: float) -> DistinctTimesteps:
        """Of the video tokens. LTX-2 scales a held token's share of the level, LTX-Video bounds it by the level."""
        if self._freedom is None:
            return DistinctTimesteps.uniform(torch.full((num_samples,), sigma, device=self._device))
        values_BK, index_BT = self._freedom.values_BK, self._freedom.index_BT
        values_BK = values_BK.clamp(max=sigma) if self._stage.family == "ltx_video" else values_BK * sigma
        return DistinctTimesteps(
            values_BK.expand(num_samples, -1), None if index_BT is None else index_BT.expand(num_samples, -1)
        )

    def _velocities(
        self, names: Sequence[str], guidance: GuidanceConfig, state: Tokens, sigma: float
    ) -> list[Velocities]:
        """One call of the denoiser, one sample for each name."""
        video, audio = self._streams(names, state, sigma)
        negatives = tuple(name == NEGATIVE for name in names)
        if negatives not in self._conditioning:
            self._conditioning[negatives] = self._denoiser.prepare(video, audio)
        perturbations = None
        if PERTURBED in names or ISOLATED in names:
            perturbations = [self._perturbation(name, guidance) for name in names]
        video_PTC, audio_PTC = self._denoiser(video, audio, self._conditioning[negatives], perturbations)
        assert video_PTC is not None, "a call is always given video"
        return [
            (video_PTC[i : i + 1].float(), None if audio_PTC is None else audio_PTC[i : i + 1].float())
            for i in range(len(names))
        ]

    def _streams(self, names: Sequence[str], state: Tokens, sigma: float) -> tuple[TokenStream, TokenStream | None]:
        count = len(names)
        sigma_P = torch.full((count,), sigma, device=self._device)
        texts = [self._text(name) for name in names]
        masks = [text.mask_BS for text in texts if text.mask_BS is not None]
        video = TokenStream(
            state.video_BTC.expand(count, -1, -1),
            self._timesteps(count, sigma),
            sigma_P,
            self._video_positions_B3T2,
            torch.cat([text.video_BSD for text in texts]),
            torch.cat(masks) if masks else None,
        )
        if state.audio_BTC is None:
            return video, None
        audio = TokenStream(
            state.audio_BTC.expand(count, -1, -1),
            DistinctTimesteps.uniform(sigma_P),
            sigma_P,
            self._audio_positions_B1T2,
            torch.cat([text.audio_BSD for text in texts if text.audio_BSD is not None]),
        )
        return video, audio

    def _text(self, name: str) -> TextContext:
        texts = self._scene.texts
        if name != NEGATIVE:
            return texts.positive
        assert texts.negative is not None, "the engine encodes the negative prompt of every recipe that is guided by it"
        return texts.negative

    def _perturbation(self, name: str, guidance: GuidanceConfig) -> Perturbation:
        if name == PERTURBED:
            blocks = frozenset(guidance.stg_blocks)
            return Perturbation(blocks, blocks, strategy=cast(SkipStrategy, self._stage.stg_strategy))
        return Perturbation(isolate_streams=name == ISOLATED)
