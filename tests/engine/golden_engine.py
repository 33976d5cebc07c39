"""An engine of a golden checkpoint, whose text encoder and random numbers are a record's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from kernels.ops import reference_ops
from pipeline.engine.components.audio_vae import load_audio_decoder
from pipeline.engine.components.connectors import load_text_connectors
from pipeline.engine.components.upsampler import load_latent_upsampler
from pipeline.engine.components.video_vae import load_video_decoder, load_video_encoder
from pipeline.engine.components.vocoder import load_vocoder
from pipeline.engine.engine import RenderEngine
from pipeline.engine.latents import NoiseSource
from pipeline.engine.text import TextConditioner
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import CheckpointFile, load_denoiser


def engine_builder(folder: Path, upscaler_name: str) -> Callable[[Any, Callable[[], NoiseSource]], RenderEngine]:
    """Loads the parts once; what is returned takes a text encoder, and what makes a clip's noise."""
    checkpoint = CheckpointFile(folder / "checkpoint.safetensors")
    connectors = load_text_connectors(checkpoint, device="cpu", dtype=None)
    video_decoder = load_video_decoder(checkpoint, device="cpu", dtype=None)
    denoiser = load_denoiser(checkpoint, reference_ops(), "cpu")
    upscaler = CheckpointFile(folder / upscaler_name)
    has_audio = denoiser.hparams.audio is not None
    parts: dict[str, Any] = {
        "denoiser": denoiser,
        "fused": FusedAdapters(denoiser, checkpoint, None),
        "adapter_files": {},
        "upsampler": load_latent_upsampler(upscaler, video_decoder.statistics, device="cpu", dtype=None),
        "video_encoder": load_video_encoder(checkpoint, device="cpu", dtype=None),
        "video_decoder": video_decoder,
        "audio_decoder": load_audio_decoder(checkpoint, device="cpu", dtype=None) if has_audio else None,
        "vocoder": load_vocoder(checkpoint, device="cpu") if has_audio else None,
        "device": "cpu",
    }

    def build(encoder: Any, noise: Callable[[], NoiseSource]) -> RenderEngine:
        return RenderEngine(
            text=TextConditioner(encoder, connectors, device="cpu"), noise_for=lambda seed: noise(), **parts
        )

    return build


def recorded(draws: Iterable[Tensor]) -> NoiseSource:
    """Noise that gives the tensors of a record in turn, and sees that they are of the shapes asked for."""
    remaining = iter(draws)

    def draw(shape: tuple[int, ...]) -> Tensor:
        noise = next(remaining)
        assert tuple(noise.shape) == tuple(shape)
        return noise

    return draw
