"""Latents and tokens: noise, packing, positions, normalising, noising again. Pure tensor functions.

The denoiser sees tokens, the decoders and the upsampler see latents; both layouts and the way between them live
here. Which noise level comes when is the recipe's; the networks are in `components/`.

Shapes: B batch, C channels, F latent frames, H latent height, W latent width, T tokens, M latent mel bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.geometry import AUDIO_LATENTS_PER_SECOND, SPATIAL_CELL_PX, TEMPORAL_CELL_FRAMES, LatentShape

# Mel frames of one audio latent; the first latent holds a single one (the audio VAE is causal).
MEL_FRAMES_PER_LATENT = 4
MEL_FRAMES_PER_SECOND = AUDIO_LATENTS_PER_SECOND * MEL_FRAMES_PER_LATENT

# Called with a shape and answers with standard normal noise in float32 on the CPU.
NoiseSource = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Both streams in token layout (B,T,C), float32; `audio_BTC` is None for a model without sound."""

    video_BTC: Tensor
    audio_BTC: Tensor | None

    def map(self, function: Callable[..., Tensor], *others: Tokens) -> Tokens:
        """`function` of each stream's tensors, these first, then those of `others`; video before audio."""
        video_BTC = function(self.video_BTC, *(other.video_BTC for other in others))
        if self.audio_BTC is None:
            return Tokens(video_BTC, None)
        return Tokens(video_BTC, function(self.audio_BTC, *(other.audio_BTC for other in others)))


class ChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel: between the decoder's scale and the denoiser's."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_channels))
        self.register_buffer("std", torch.ones(num_channels))

    def unnormalise(self, x: Tensor, *, dim: int) -> Tensor:
        """From the denoiser's scale to the decoder's; channels along `dim`."""
        return x * _along(self.std, x, dim) + _along(self.mean, x, dim)

    def normalise(self, x: Tensor, *, dim: int) -> Tensor:
        """From the decoder's scale to the denoiser's; channels along `dim`."""
        return (x - _along(self.mean, x, dim)) / _along(self.std, x, dim)


def seeded_noise(seed: int) -> NoiseSource:
    """Noise of one clip: all draws come in turn from one generator on the CPU, so every device sees the same."""
    generator = torch.Generator("cpu").manual_seed(seed % 2**64)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    return draw


def add_noise(clean: Tokens, noise: NoiseSource, sigma: float) -> Tokens:
    """`clean` moved towards fresh noise by `sigma` in [0,1]; video draws before audio, as the reference does."""
    return clean.map(lambda x_BTC: torch.lerp(x_BTC, noise(tuple(x_BTC.shape)).to(x_BTC.device), sigma))


def empty_tokens(shape: LatentShape, *, video_channels: int, audio_channels: int | None, device: str) -> Tokens:
    """The state before any stage: zeros, which `add_noise` at 1 turns into pure noise."""
    video_BTC = torch.zeros(1, shape.num_video_tokens, video_channels, device=device)
    if audio_channels is None:
        return Tokens(video_BTC, None)
    return Tokens(video_BTC, torch.zeros(1, shape.num_audio_latents, audio_channels, device=device))


def patchify_video(latent_BCFHW: Tensor) -> Tensor:
    """One token a latent cell, frames slowest: (B,C,F,H,W) to (B,T,C)."""
    return latent_BCFHW.flatten(2).transpose(1, 2)


def unpatchify_video(tokens_BTC: Tensor, shape: LatentShape) -> Tensor:
    """(B,T,C) to (B,C,F,H,W)."""
    return tokens_BTC.transpose(1, 2).unflatten(2, (shape.num_frames, shape.height, shape.width))


def patchify_audio(latent_BCTM: Tensor) -> Tensor:
    """One token a time step, channel and mel bin in its vector: (B,C,T,M) to (B,T,C*M)."""
    return latent_BCTM.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens_BTC: Tensor, num_bins: int) -> Tensor:
    """(B,T,C*M) to (B,C,T,M)."""
    return tokens_BTC.unflatten(2, (-1, num_bins)).transpose(1, 2)


def video_positions(shape: LatentShape, *, device: torch.device | str) -> Tensor:
    """[start,end) of each token in seconds, pixel row and pixel column: (1,3,T,2), float32.

    The first latent frame covers a single picture, so every bound in time moves back by seven frames, not below 0.
    """
    counts = (shape.num_frames, shape.height, shape.width)
    cell = torch.tensor((TEMPORAL_CELL_FRAMES, SPATIAL_CELL_PX, SPATIAL_CELL_PX), device=device)
    starts = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in counts), indexing="ij"))
    bounds = torch.stack((starts, starts + 1), dim=-1).flatten(1, 3) * cell[:, None, None]
    bounds[0] = (bounds[0] + 1 - TEMPORAL_CELL_FRAMES).clamp(min=0)
    positions = bounds.float()
    positions[0] /= shape.fps
    return positions[None]


def keyframe_positions(shape: LatentShape, frame: int, *, device: torch.device | str) -> Tensor:
    """[start,end) of the tokens of one picture shown at pixel frame `frame`, in space as the clip's: (1,3,T,2)."""
    positions = video_positions(replace(shape, num_frames=1), device=device)
    positions[:, 0, :] = torch.tensor((frame, frame + 1), device=device) / shape.fps
    return positions


def audio_positions(shape: LatentShape, *, device: torch.device | str) -> Tensor:
    """[start,end) of each audio token in seconds: (1,1,T,2), float32; clamped at 0 like the video's."""
    starts = torch.arange(shape.num_audio_latents, device=device)
    mel_frames = torch.stack((starts, starts + 1), dim=-1) * MEL_FRAMES_PER_LATENT
    mel_frames = (mel_frames + 1 - MEL_FRAMES_PER_LATENT).clamp(min=0)
    return (mel_frames / MEL_FRAMES_PER_SECOND)[None, None]


def _along(values_C: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.ndim
    shape[dim] = -1
    return values_C.view(shape)
