"""The render engine: a request and a recipe in, frames and sound out.

Reads as the recipe does. How text, noise, steps and decoding work is in the neighbouring modules, the loading of the
parts in `loading.py`; where the frames go and what a clip costs is known above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.config.recipe import RecipeConfig
from pipeline.engine import components
from pipeline.engine.decode import decode_frames, decode_waveform
from pipeline.engine.denoise import Scene, Texts, denoise
from pipeline.engine.latents import (
    NoiseSource,
    Tokens,
    add_noise,
    empty_tokens,
    patchify_video,
    seeded_noise,
    unpatchify_audio,
    unpatchify_video,
)
from pipeline.engine.samplers import sampler_named
from pipeline.engine.sigmas import noise_levels
from pipeline.engine.text import TextConditioner
from pipeline.errors import OutOfMemory, UsageError
from pipeline.geometry import LatentShape, PixelShape, RenderShape, latent_shape
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.records.request import RenderRequest
from pipeline.telemetry import OnStage


@dataclass(frozen=True)
class Streams:
    """A rendered clip: uint8 frames (F,H,W,3) in chunks, decoded while iterated, and sound (channels, samples).

    A model without sound gives no waveform and no rate.
    """

    frames: Iterator[np.ndarray]
    waveform: np.ndarray | None
    sample_rate_hz: int | None


@dataclass(frozen=True)
class Latents:
    """Both streams after the last stage, normalised: (B,C,F,H,W) and (B,C,T,mel bins), or None without sound."""

    video_BCFHW: Tensor
    audio_BCTM: Tensor | None


@dataclass(frozen=True, kw_only=True)
class RenderEngine:
    """Every part of one model on one device. Not thread-safe."""

    text: TextConditioner
    denoiser: AudioVideoDenoiser
    upsampler: components.LatentUpsampler | None
    video_decoder: components.VideoDecoder
    # None for a model without sound.
    audio_decoder: components.AudioDecoder | None
    vocoder: components.Vocoder | None
    device: str
    # From a clip's seed to its noise.
    noise_for: Callable[[int], NoiseSource] = seeded_noise

    def render(self, request: RenderRequest, recipe: RecipeConfig, on_stage: OnStage) -> Streams:
        """One clip. `on_stage` is called as each stage begins; "decode" lasts until the frames are exhausted.

        UsageError if the recipe asks for what this engine lacks; EngineFault if a result is not finite; OutOfMemory
        if the clip does not fit the device, also while the frames are iterated.
        """
        self._require_can_follow(recipe)
        shape, noise = request.shape, self.noise_for(request.seed)
        with _memory_reported(shape):
            on_stage("text_encode")
            with torch.inference_mode():
                texts = self._texts(request.prompt, recipe)
            latents = self.sample(texts, shape.rendered, recipe, noise, on_stage)

            on_stage("decode")
            waveform = None
            if self.audio_decoder is not None and self.vocoder is not None and latents.audio_BCTM is not None:
                waveform = decode_waveform(self.audio_decoder, self.vocoder, latents.audio_BCTM)
        rate = None if self.vocoder is None else self.vocoder.sample_rate_hz
        return Streams(self._frames(latents.video_BCFHW, shape, recipe), waveform, rate)

    @torch.inference_mode()
    def sample(
        self, texts: Texts, rendered: PixelShape, recipe: RecipeConfig, noise: NoiseSource, on_stage: OnStage
    ) -> Latents:
        """All stages of the recipe: both streams go through each of them, each from where the one before ended."""
        shapes = [_latent_shape(rendered, *size) for size in recipe.stage_sizes(rendered.height, rendered.width)]
        tokens, before, sounds = self._empty(shapes[0]), shapes[0], []
        for stage, shape in zip(recipe.stages, shapes, strict=True):
            if stage.upsample != 1:
                on_stage("upsample")
                tokens = replace(tokens, video_BTC=self._upsampled(tokens.video_BTC, before))

            on_stage("denoise")
            sigma = noise_levels(stage.levels(shape.num_video_tokens))[0]
            tokens = denoise(self.denoiser, add_noise(tokens, noise, sigma), Scene(shape, texts), stage, noise)
            before = shape
            sounds.append(tokens.audio_BTC)
        sound_BTC = sounds[recipe.sound_from_stage - 1]
        return Latents(unpatchify_video(tokens.video_BTC, before), self._unpatchified(sound_BTC))

    def _texts(self, prompt: str, recipe: RecipeConfig) -> Texts:
        negative = self.text.encode(recipe.negative_prompt) if recipe.has_guidance else None
        return Texts(self.text.encode(prompt), negative)

    def _empty(self, shape: LatentShape) -> Tokens:
        video, audio = self.denoiser.hparams.video, self.denoiser.hparams.audio
        audio_channels = None if audio is None else audio.in_channels
        return empty_tokens(shape, video_channels=video.in_channels, audio_channels=audio_channels, device=self.device)

    def _upsampled(self, video_BTC: Tensor, shape: LatentShape) -> Tensor:
        assert self.upsampler is not None, "asked for before the first stage"
        return patchify_video(self.upsampler.upsample(unpatchify_video(video_BTC, shape)))

    def _unpatchified(self, audio_BTC: Tensor | None) -> Tensor | None:
        if audio_BTC is None or self.audio_decoder is None:
            return None
        return unpatchify_audio(audio_BTC, self.audio_decoder.num_latent_bins)

    def _frames(self, latent_BCFHW: Tensor, shape: RenderShape, recipe: RecipeConfig) -> Iterator[np.ndarray]:
        with _memory_reported(shape):
            yield from decode_frames(self.video_decoder, latent_BCFHW, shape, resize=recipe.resize)

    def _require_can_follow(self, recipe: RecipeConfig) -> None:
        num_blocks = self.denoiser.hparams.num_layers
        for stage in recipe.stages:
            sampler_named(stage.sampler)
            for guidance in stage.guidance:
                if any(block >= num_blocks for block in guidance.stg_blocks):
                    raise UsageError(
                        f"recipe.stages.guidance.stg_blocks must be blocks of the model, 0 to {num_blocks - 1}, got "
                        f"{guidance.stg_blocks}; correct recipe {recipe.name} or model.tuning.stg_blocks"
                    )
        if any(stage.upsample != 1 for stage in recipe.stages) and self.upsampler is None:
            raise UsageError(f"recipe {recipe.name} needs model.spatial_upscaler, got none; use a recipe of one stage")


def _latent_shape(rendered: PixelShape, height: int, width: int) -> LatentShape:
    shape = latent_shape(replace(rendered, height=height, width=width))
    # A single frame at a high rate rounds to no sound at all, which neither denoiser nor decoder can take.
    return replace(shape, num_audio_latents=max(1, shape.num_audio_latents))


@contextmanager
def _memory_reported(shape: RenderShape) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        pixels = shape.rendered
        size = f"{pixels.width}x{pixels.height}, {pixels.num_frames} frames"
        raise OutOfMemory(f"a clip of {size} does not fit the device: {str(error).splitlines()[0]}") from error
