"""The parts of a model drawn at random on their device, and the engine that they make with a denoiser. No file is read.

All parts that a worker holds but the text encoder and its connectors: embeddings of prompts are given. The denoiser's
weights are `tiers.py`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.ops import fused_ops
from pipeline.bench.tiers import SEED, Built, text_channels
from pipeline.bench.timing import num_bytes
from pipeline.config.model import ModelConfig
from pipeline.engine.components.audio_vae import (
    LATENT_BIN_DIVISOR,
    AudioDecoder,
    audio_decoder_blueprint,
    audio_sizes,
)
from pipeline.engine.components.blueprint import Blueprint
from pipeline.engine.components.text import TextContext
from pipeline.engine.components.upsampler import LatentUpsampler, latent_upsampler_blueprint
from pipeline.engine.components.video_vae import (
    VideoDecoder,
    VideoEncoder,
    laid_out,
    manner_on,
    video_decoder_blueprint,
    video_encoder_blueprint,
)
from pipeline.engine.components.vocoder import Vocoder, vocoder_blueprint, waveform_rate_hz
from pipeline.engine.engine import RenderEngine
from pipeline.engine.latents import ChannelStatistics
from pipeline.engine.random_weights import random_value
from pipeline.engine.residency import Residency
from pipeline.engine.text import TextConditioner
from pipeline.errors import UsageError
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import set_tensor
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.hparams import DenoiserHparams


class GivenTexts(TextConditioner):
    """Embeddings that lie on the device already: the same for every prompt, others for a negative one."""

    def __init__(self, hparams: DenoiserHparams, num_tokens: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(SEED)

        def draw() -> TextContext:
            video, audio = (
                None if stream is None else torch.randn(
                    1, num_tokens, text_channels(hparams, stream), device=device, dtype=torch.bfloat16,
                    generator=generator,
                )
                for stream in (hparams.video, hparams.audio)
            )  # fmt: skip
            assert video is not None, "every model has a video stream"
            return TextContext(video, audio)

        self._contexts = [draw(), draw()]

    def encode_all(self, *prompts: str) -> list[TextContext]:
        """The contexts of a prompt, and of a negative one if it is asked for."""
        return self._contexts[: len(prompts)]

    @property
    def num_bytes(self) -> int:
        tensors = (tensor for each in self._contexts for tensor in (each.video_BSD, each.audio_BSD))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class NoAdapters(FusedAdapters):
    """Random weights have no files to be read again from, so nothing is ever fused into them."""

    def __init__(self) -> None:
        self.num_fusions = 0

    def use(self, adapters: Sequence[tuple[str | Path, float]]) -> None:
        self.check(adapters)

    def check(self, adapters: Sequence[tuple[str | Path, float]]) -> None:
        if adapters:
            raise UsageError(f"random weights take no adapters, got {len(adapters)}; use a recipe without them")


@dataclass(frozen=True, eq=False)
class Parts:
    """All of an engine but its denoiser. `held_bytes` is what they take of the device between clips."""

    text: GivenTexts
    upsampler: LatentUpsampler
    video_encoder: VideoEncoder
    video_decoder: VideoDecoder
    audio_decoder: AudioDecoder | None
    vocoder: Vocoder | None
    held_bytes: int


@torch.no_grad()
def draw_parts(config: Mapping[str, Any], upscaler: Mapping[str, Any], model: ModelConfig, device: str) -> Parts:
    """Parts of the published layouts: `config` and `upscaler` are the metadata of a model's two files."""
    generator = torch.Generator(device).manual_seed(SEED)
    hparams = DenoiserHparams.from_config(config["transformer"], has_audio=model.size.has_audio)
    vae = dict(config["vae"])
    decoder = as_loaded(random_video_decoder(vae, device), device)
    encoder = _drawn(video_encoder_blueprint(vae), "BF16", generator)
    upsampler = _drawn(latent_upsampler_blueprint(dict(upscaler)), "BF16", generator)
    modules = [decoder.module, encoder, upsampler]
    audio_decoder = vocoder = None
    if model.size.has_audio:
        audio_vae, of_vocoder = dict(config["audio_vae"]), dict(config["vocoder"])
        sizes = audio_sizes(audio_vae)
        num_bins = sizes["mel_bins"] // LATENT_BIN_DIVISOR
        statistics = ChannelStatistics(sizes["z_channels"] * num_bins).to(device)
        modules += [
            _drawn(audio_decoder_blueprint(audio_vae), "BF16", generator),
            # In float32 always, as it is loaded.
            _drawn(vocoder_blueprint(of_vocoder, mel_bins=sizes["mel_bins"]), "F32", generator),
        ]
        audio_decoder = AudioDecoder(modules[-2], statistics, num_latent_bins=num_bins)
        vocoder = Vocoder(modules[-1], sample_rate_hz=waveform_rate_hz(audio_vae, of_vocoder))
    text = GivenTexts(hparams, model.size.text_tokens, device)
    return Parts(
        text=text,
        upsampler=LatentUpsampler(upsampler, decoder.statistics),
        video_encoder=VideoEncoder(encoder, decoder.statistics),
        video_decoder=decoder,
        audio_decoder=audio_decoder,
        vocoder=vocoder,
        held_bytes=text.num_bytes + sum(num_bytes(module) for module in modules),
    )


def random_video_decoder(vae: Mapping[str, Any], device: str) -> VideoDecoder:
    """The decoder of a `vae` section, drawn in bfloat16; its weights lie in memory as torch makes them."""
    generator = torch.Generator(device).manual_seed(SEED)
    module = _drawn(video_decoder_blueprint(dict(vae)), "BF16", generator)
    statistics = ChannelStatistics(vae["latent_channels"]).to(device)
    takes_noise = vae.get("timestep_conditioning", False)
    return VideoDecoder(module, statistics, takes_noise=takes_noise, ops=fused_ops(device))


def as_loaded(decoder: VideoDecoder, device: str) -> VideoDecoder:
    """The decoder laid out and working as `load_video_decoder` leaves one on this device."""
    decoder.module = laid_out(decoder.module, device)
    decoder.manner = manner_on(device, decoder.ops)
    return decoder


def engine_of(parts: Parts, built: Built, device: str) -> RenderEngine:
    """What `load_engine` and a worker make of a denoiser and the other parts, all of them resident."""
    assert isinstance(built.module, AudioVideoDenoiser), "one of our tiers"
    return RenderEngine(
        text=parts.text,
        denoiser=built.module,
        fused=NoAdapters(),
        adapter_files={},
        upsampler=parts.upsampler,
        video_encoder=parts.video_encoder,
        # Of its own, as an engine's is; the weights are shared.
        video_decoder=copy.copy(parts.video_decoder),
        audio_decoder=parts.audio_decoder,
        vocoder=parts.vocoder,
        device=device,
        residency=Residency(device),
        shortcuts=built.shortcuts,
    )


def _drawn(plan: Blueprint, dtype: str, generator: torch.Generator) -> Any:
    """A part with values of the spreads that its published names ask for, ready for inference."""
    module: nn.Module = plan.module
    shapes = {place: tuple(tensor.shape) for place, tensor in module.state_dict().items()}
    for stored, place in plan.names.items():
        set_tensor(module, place, random_value(stored, shapes[place], dtype, {}, generator).to(generator.device))
    # With what is computed and not of the file.
    return module.to(generator.device).eval().requires_grad_(False)
