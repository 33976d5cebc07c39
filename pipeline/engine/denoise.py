"""The sampling loop: a function of denoiser, start, text, steps and sampler. Knows no prompt, recipe or file.

What outlasts a step (rotary tables, projected text) is computed once a call. No guidance: the distilled weights
need none.

Shapes: B batch, T tokens, C channels, D channels of a text embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.engine.components.text import TextContext
from pipeline.engine.latents import Tokens, audio_positions, video_positions
from pipeline.engine.samplers import Sampler
from pipeline.engine.sigmas import NoiseStep
from pipeline.errors import EngineFault
from pipeline.geometry import LatentShape
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.streams import DistinctTimesteps, TokenStream


@dataclass(frozen=True)
class StepResult:
    """What one step gave: the clean tokens the denoiser predicts, and the state the sampler moved to."""

    clean: Tokens
    state: Tokens


def denoise(
    denoiser: AudioVideoDenoiser,
    start: Tokens,
    text: TextContext,
    shape: LatentShape,
    steps: Sequence[NoiseStep],
    sampler: Sampler,
) -> Tokens:
    """The state after all steps. EngineFault if it is not finite."""
    state = start
    for progress in denoising(denoiser, start, text, shape, steps, sampler):
        state = progress.state
    for name, tokens_BTC in (("video", state.video_BTC), ("audio", state.audio_BTC)):
        # Looked at once a stage, not once a step: on an accelerator looking means waiting.
        if not bool(torch.isfinite(tokens_BTC).all()):
            raise EngineFault(f"the denoiser gave {name} latents that are not finite numbers after {len(steps)} steps")
    return state


def denoising(
    denoiser: AudioVideoDenoiser,
    start: Tokens,
    text: TextContext,
    shape: LatentShape,
    steps: Sequence[NoiseStep],
    sampler: Sampler,
) -> Iterator[StepResult]:
    """Every step in turn, from `start`, whose noise level is the first step's. Arithmetic between calls is float32."""
    device = start.video_BTC.device
    video_positions_B3T2 = video_positions(shape, device=device)
    audio_positions_B1T2 = audio_positions(shape, device=device)
    unset_B = torch.zeros(start.video_BTC.shape[0], device=device)
    video = _stream(start.video_BTC, unset_B, video_positions_B3T2, text.video_BSD)
    assert text.audio_BSD is not None, "a denoiser with sound has a text context for it"
    audio = _stream(start.audio_BTC, unset_B, audio_positions_B1T2, text.audio_BSD)
    conditioning = denoiser.prepare(video, audio)
    state = start
    for step in steps:
        sigma_B = torch.full_like(unset_B, step.sigma)
        video_velocity_BTC, audio_velocity_BTC = denoiser(
            _at(video, state.video_BTC, sigma_B), _at(audio, state.audio_BTC, sigma_B), conditioning
        )
        clean = Tokens(
            state.video_BTC - step.sigma * video_velocity_BTC.float(),
            state.audio_BTC - step.sigma * audio_velocity_BTC.float(),
        )
        state = Tokens(sampler(state.video_BTC, clean.video_BTC, step), sampler(state.audio_BTC, clean.audio_BTC, step))
        yield StepResult(clean, state)


def _stream(tokens_BTC: Tensor, sigma_B: Tensor, positions_BAT2: Tensor, text_BSD: Tensor) -> TokenStream:
    # No text mask: the connectors left no padding in the context.
    return TokenStream(tokens_BTC, DistinctTimesteps.uniform(sigma_B), sigma_B, positions_BAT2, text_BSD)


def _at(stream: TokenStream, tokens_BTC: Tensor, sigma_B: Tensor) -> TokenStream:
    return replace(stream, tokens_BTC=tokens_BTC, timesteps=DistinctTimesteps.uniform(sigma_B), sigma_B=sigma_B)
