"""Latent upsamplers: more height and width, or more frames, before a clip is denoised again at that size.

Also what the LTX-Video recipes do to the result: matching its statistics to the original's, and bounding its range.

Shapes: B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from torch import Tensor, nn

from pipeline.engine.components.blueprint import Blueprint, Section
from pipeline.engine.latents import ChannelStatistics
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import CheckpointFile


class LatentUpsampler:
    """Normalised video latents (B,C,F,H,W) to normalised latents of more height and width, or of 2F-1 frames."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics) -> None:
        self._module = module
        self._statistics = statistics

    def upsample(self, latent_BCFHW: Tensor) -> Tensor:
        latent = self._statistics.unnormalise(latent_BCFHW.float(), dim=1)
        latent = self._module(latent.to(next(self._module.parameters()).dtype)).float()
        return self._statistics.normalise(latent, dim=1)


def load_latent_upsampler(
    file: CheckpointFile,
    statistics: ChannelStatistics,
    *,
    spatial_scale: float = 2.0,
    temporal_scale: int = 1,
    device: str,
    dtype: torch.dtype | None,
) -> LatentUpsampler:
    """Upsampler from its own file; UsageError if the file is of another kind, scale or latent."""
    config = _kind(file.config)
    found, wanted = (config["spatial_scale"], config["temporal_scale"]), (spatial_scale, temporal_scale)
    if found != wanted:
        raise UsageError(
            f"{file.path}: the upscaler must scale space and time by {wanted[0]:g} and {wanted[1]}, got "
            f"{found[0]:g} and {found[1]} (its spatial_scale, spatial_upsample, temporal_upsample); name another file"
        )
    channels, expected = config["in_channels"], statistics.mean.numel()
    if channels != expected:
        raise UsageError(f"the upscaler works on {channels} latent channels, the model has {expected}")
    plan = latent_upsampler_blueprint(file.config)
    unknown = sorted(set(file.tensor_specs()) - set(plan.names))
    if unknown:
        raise CheckpointMismatch(f"the upscaler's file holds unknown tensors: {', '.join(unknown)}")
    return LatentUpsampler(plan.fill(file, device=device, dtype=dtype, what="the upscaler"), statistics)


def latent_upsampler_blueprint(config: dict[str, Any]) -> Blueprint:
    """Any published upsampler; `config` is the whole metadata of its file. UsageError for any other kind of file."""
    config = _kind(config)
    with torch.device("meta"):
        module = LTX2LatentUpsamplerModel(
            in_channels=config["in_channels"],
            mid_channels=config["mid_channels"],
            num_blocks_per_stage=config["num_blocks_per_stage"],
            dims=config["dims"],
            spatial_upsample=config["spatial_upsample"],
            temporal_upsample=config["temporal_upsample"],
            rational_spatial_scale=config["spatial_scale"],
            use_rational_resampler=config.get("rational_resampler", False),
        )
    return Blueprint(module, {name: name for name in module.state_dict()})


def adapt_statistics(latent_BCFHW: Tensor, reference_BCFHW: Tensor, *, factor: float = 1.0) -> Tensor:
    """Each channel moved towards the mean and spread it has in `reference_BCFHW`; `factor` 0 changes nothing.

    Adaptive instance normalisation (X. Huang, S. Belongie, 2017), each clip of the batch by itself.
    """
    axes = (2, 3, 4)
    spread, mean = torch.std_mean(latent_BCFHW, dim=axes, keepdim=True)
    wanted_spread, wanted_mean = torch.std_mean(reference_BCFHW, dim=axes, keepdim=True)
    return torch.lerp(latent_BCFHW, (latent_BCFHW - mean) / spread * wanted_spread + wanted_mean, factor)


def compress_range(latent: Tensor, *, compression: float) -> Tensor:
    """Large values made smaller, small ones kept; `compression` from 0 (nothing) to 1.

    The tone mapping of LTX-Video's distilled recipes: x * (1 - 0.8 k sigmoid(4 k (abs(x) - 1))), k = 0.75 compression.
    """
    k = 0.75 * compression
    return latent * (1 - 0.8 * k * torch.sigmoid(4 * k * (latent.abs() - 1)))


def _kind(config: dict[str, Any]) -> Section:
    """The metadata with what older files leave out; UsageError if it describes no upsampler."""
    if config.get("_class_name") != "LatentUpsampler":
        raise UsageError(
            f"an upscaler's file must hold a LatentUpsampler, got _class_name {config.get('_class_name')!r}"
        )
    full = Section(config)
    full["temporal_scale"] = 2 if full["temporal_upsample"] else 1
    full["spatial_scale"] = full.get("spatial_scale", 2.0) if full["spatial_upsample"] else 1.0
    if full["spatial_upsample"] and full["spatial_scale"] != 2.0 and not full.get("rational_resampler", False):
        raise UsageError(f"only a rational resampler scales by spatial_scale {full['spatial_scale']}; use 2")
    return full
