"""The render engine: a request and a recipe in, frames and sound out; and the loading of all its parts.

Reads as the recipe does. How text, noise, steps and decoding work is in the neighbouring modules; where the frames go
and what a clip costs is known above.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.ops import OpSet
from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.config.recipe import RecipeConfig
from pipeline.engine.components.audio_vae import AudioDecoder, load_audio_decoder
from pipeline.engine.components.connectors import load_text_connectors
from pipeline.engine.components.parts import tensors_of_parts
from pipeline.engine.components.text import TextContext
from pipeline.engine.components.text_encoder import load_text_encoder
from pipeline.engine.components.upsampler import LatentUpsampler, load_latent_upsampler
from pipeline.engine.components.video_vae import VideoDecoder, load_video_decoder
from pipeline.engine.components.vocoder import Vocoder, load_vocoder
from pipeline.engine.decode import decode_frames, decode_waveform
from pipeline.engine.denoise import denoise
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
from pipeline.engine.sigmas import noise_levels, noise_steps
from pipeline.engine.text import TextConditioner
from pipeline.errors import CheckpointMismatch, OutOfMemory, UsageError
from pipeline.geometry import LatentShape, PixelShape, RenderShape, latent_shape, render_shape
from pipeline.model.checkpoint import CheckpointFile, denoiser_tensors, load_denoiser, read_hparams
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.dtypes import require_usable_dtypes
from pipeline.records.request import RenderRequest
from pipeline.telemetry import OnStage

log = logging.getLogger("pipeline.engine")

_DTYPES: dict[str, torch.dtype | None] = {
    "checkpoint": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
# Encoders are not loaded yet; published files may also carry statistics that no released code reads.
_KNOWN_AND_UNUSED = re.compile(
    r"(vae|audio_vae)\.encoder\..+"
    r"|vae\.per_channel_statistics\.(channel|mean-of-stds|mean-of-stds_over_std-of-means)"
)


@dataclass(frozen=True)
class Streams:
    """A rendered clip: uint8 frames (F,H,W,3) in chunks, decoded while iterated, and sound (channels, samples)."""

    frames: Iterator[np.ndarray]
    waveform: np.ndarray
    sample_rate_hz: int


@dataclass(frozen=True)
class Latents:
    """Both streams after the last stage, normalised: (B,C,F,H,W) and (B,C,T,mel bins)."""

    video_BCFHW: Tensor
    audio_BCTM: Tensor


@dataclass(frozen=True, kw_only=True)
class RenderEngine:
    """Every part of one model on one device. Not thread-safe."""

    text: TextConditioner
    denoiser: AudioVideoDenoiser
    upsampler: LatentUpsampler | None
    video_decoder: VideoDecoder
    audio_decoder: AudioDecoder
    vocoder: Vocoder
    device: str
    # From a clip's seed to its noise.
    noise_for: Callable[[int], NoiseSource] = seeded_noise

    def render(self, request: RenderRequest, recipe: RecipeConfig, on_stage: OnStage) -> Streams:
        """One clip. `on_stage` is called as each stage begins; "decode" lasts until the frames are exhausted.

        UsageError if the recipe asks for what this engine lacks; EngineFault if a result is not finite; OutOfMemory
        if the clip does not fit the device, also while the frames are iterated.
        """
        self._require_can_follow(recipe)
        asked = PixelShape(request.num_frames, request.height, request.width, request.fps)
        shape = render_shape(asked, recipe.grid_px)
        with _memory_reported(shape):
            on_stage("text_encode")
            with torch.inference_mode():
                text = self.text.encode(request.prompt)
            latents = self.sample(text, shape.rendered, recipe, self.noise_for(request.seed), on_stage)

            on_stage("decode")
            waveform = decode_waveform(self.audio_decoder, self.vocoder, latents.audio_BCTM)
        return Streams(self._frames(latents.video_BCFHW, shape), waveform, self.vocoder.sample_rate_hz)

    @torch.inference_mode()
    def sample(
        self,
        text: TextContext,
        rendered: PixelShape,
        recipe: RecipeConfig,
        noise: NoiseSource,
        on_stage: OnStage,
    ) -> Latents:
        """All stages of the recipe: both streams go through each of them, and the last one's sound ships."""
        shape = _stage_shape(rendered, recipe.stages[0].size_divisor)
        tokens = self._empty(shape)
        for stage in recipe.stages:
            stage_shape = _stage_shape(rendered, stage.size_divisor)
            if stage_shape != shape:
                on_stage("upsample")
                tokens = replace(tokens, video_BTC=self._upsampled(tokens.video_BTC, shape))
                shape = stage_shape

            on_stage("denoise")
            tokens = add_noise(tokens, noise, noise_levels(stage.sigmas)[0])
            sampler = sampler_named(stage.sampler)
            tokens = denoise(self.denoiser, tokens, text, shape, noise_steps(stage.sigmas), sampler)
        return Latents(
            unpatchify_video(tokens.video_BTC, shape),
            unpatchify_audio(tokens.audio_BTC, self.audio_decoder.num_latent_bins),
        )

    def _empty(self, shape: LatentShape) -> Tokens:
        video, audio = self.denoiser.hparams.video, self.denoiser.hparams.audio
        assert audio is not None, "load_engine refuses a model without sound"
        return empty_tokens(
            shape, video_channels=video.in_channels, audio_channels=audio.in_channels, device=self.device
        )

    def _upsampled(self, video_BTC: Tensor, shape: LatentShape) -> Tensor:
        assert self.upsampler is not None, "asked for before the first stage"
        return patchify_video(self.upsampler.upsample(unpatchify_video(video_BTC, shape)))

    def _frames(self, latent_BCFHW: Tensor, shape: RenderShape) -> Iterator[np.ndarray]:
        with _memory_reported(shape):
            yield from decode_frames(self.video_decoder, latent_BCFHW, shape)

    def _require_can_follow(self, recipe: RecipeConfig) -> None:
        for stage in recipe.stages:
            sampler_named(stage.sampler)
        divisors = [stage.size_divisor for stage in recipe.stages]
        if any(after > before for before, after in pairwise(divisors)):
            raise UsageError(f"recipe {recipe.name}: size_divisor must not grow from stage to stage, got {divisors}")
        if len(set(divisors)) > 1 and self.upsampler is None:
            raise UsageError(f"recipe {recipe.name} needs model.spatial_upscaler, got none; use a recipe of one stage")


def load_engine(model: ModelConfig, precision: PrecisionConfig, *, device: str, ops: OpSet) -> RenderEngine:
    """Every part of `model` on `device`, and the calling thread's number of torch threads set.

    Raises UsageError or CheckpointMismatch, before weights are read where the headers show it, if a file is missing,
    is of another kind, or disagrees with `model.size`.
    """
    started = time.monotonic()
    torch.set_num_threads(precision.torch_threads)
    # The vocoder runs in float32 always; TensorFloat-32 would round its convolutions' inputs to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    folder, dtype = Path(model.folder), _DTYPES[precision.dtype]
    checkpoint = CheckpointFile(folder / model.checkpoint)
    _require_size(model, checkpoint)
    require_usable_dtypes(checkpoint.path, checkpoint.tensor_specs())
    _require_all_tensors_known(checkpoint)
    upscaler = CheckpointFile(folder / model.spatial_upscaler) if model.spatial_upscaler else None

    encoder = load_text_encoder(
        folder / model.text_encoder, max_tokens=model.size.text_tokens, device=device, dtype=dtype
    )
    text_loaded = time.monotonic()
    connectors = load_text_connectors(checkpoint, device=device, dtype=dtype)
    video_decoder = load_video_decoder(checkpoint, device=device, dtype=dtype)
    upsampler = None
    if upscaler is not None:
        upsampler = load_latent_upsampler(upscaler, video_decoder.statistics, device=device, dtype=dtype)
    engine = RenderEngine(
        text=TextConditioner(encoder, connectors),
        denoiser=load_denoiser(checkpoint, ops, device, dtype),
        upsampler=upsampler,
        video_decoder=video_decoder,
        audio_decoder=load_audio_decoder(checkpoint, device=device, dtype=dtype),
        vocoder=load_vocoder(checkpoint, device=device),
        device=device,
    )
    seconds = {"text_encoder_s": text_loaded - started, "load_s": time.monotonic() - started}
    log.info("engine loaded", extra={"facts": {"model": model.name, "device": device, **seconds}})
    return engine


def _stage_shape(rendered: PixelShape, divisor: int) -> LatentShape:
    shape = latent_shape(replace(rendered, height=rendered.height // divisor, width=rendered.width // divisor))
    # A single frame at a high rate rounds to no sound at all, which neither denoiser nor decoder can take.
    return replace(shape, num_audio_latents=max(1, shape.num_audio_latents))


def _require_size(model: ModelConfig, checkpoint: CheckpointFile) -> None:
    hparams = read_hparams(checkpoint)
    if hparams.audio is None:
        raise UsageError(f"{checkpoint.path} holds no audio stream; use an LTX-2 audio-video checkpoint")
    stored = {
        "num_layers": hparams.num_layers,
        "video_width": hparams.video.width,
        "audio_width": hparams.audio.width,
    }
    wrong = [
        f"model.size.{name} must be {value}, got {getattr(model.size, name)}"
        for name, value in stored.items()
        if getattr(model.size, name) != value
    ]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}: {checkpoint.path} says so; correct conf/model/{model.name}.yaml")


def _require_all_tensors_known(checkpoint: CheckpointFile) -> None:
    """The denoiser accounts for its own tensors and every part for its missing ones; this finds what nobody owns."""
    names = checkpoint.tensor_specs()
    known = set(denoiser_tensors(names)) | tensors_of_parts(checkpoint.config)
    unknown = sorted(name for name in names if name not in known and not _KNOWN_AND_UNUSED.fullmatch(name))
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointMismatch(f"{checkpoint.path} holds {len(unknown)} tensors that no part owns: {shown}")


@contextmanager
def _memory_reported(shape: RenderShape) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        pixels = shape.rendered
        size = f"{pixels.width}x{pixels.height}, {pixels.num_frames} frames"
        raise OutOfMemory(f"a clip of {size} does not fit the device: {str(error).splitlines()[0]}") from error
