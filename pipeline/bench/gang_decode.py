"""Decoding as a contestant of a gang: a latent to bytes on the leader's host, by rows over all ranks or on one device.

Shapes: B batch, C channels, F frames, R rows of planes, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.decode import DECODE_TIMESTEP
from pipeline.bench.random_parts import as_loaded, random_video_decoder
from pipeline.bench.tiers import SEED, Built, Case, Contestant, Step, Velocities, Weights
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder
from pipeline.engine.decode import Delivery, decode_frames
from pipeline.geometry import SPATIAL_CELL_PX, TEMPORAL_CELL_FRAMES, PixelShape, RenderShape
from pipeline.parallel.layout import Axis
from pipeline.parallel.rows import share_rows

# Relative L2 error of bytes whose mean is about 128: other roundings to bfloat16 move them by half a level or less.
_BOUND = 0.02


def decoding(vae: Mapping[str, Any], world: Axis | None) -> Contestant:
    """The decoder of a `vae` section, as workers decode: over the ranks of `world`, or on this device alone."""

    def build(weights: Weights) -> Built:
        decoder = as_loaded(random_video_decoder(vae, weights.device), weights.device)
        if world is not None:
            decoder.share_rows = partial(share_rows, axis=world)
        hands_out = world is None or world.index == 0
        return Built(decoder.module, partial(_bound, decoder, vae["latent_channels"], weights.device, hands_out))

    return Contestant("decode", False, build, _BOUND)


def _bound(decoder: VideoDecoder, num_channels: int, device: str, hands_out: bool, case: Case) -> Step:
    """A decode of the case's clip. Of each chunk a whole frame is kept, to compare: to keep all would cost time."""
    shape = case.shape
    pixels = PixelShape(
        (shape.num_frames - 1) * TEMPORAL_CELL_FRAMES + 1,
        shape.height * SPATIAL_CELL_PX,
        shape.width * SPATIAL_CELL_PX,
        shape.fps,
    )
    generator = torch.Generator(device).manual_seed(SEED)
    size = (1, num_channels, shape.num_frames, shape.height, shape.width)
    latent_BCFHW = torch.randn(*size, device=device, generator=generator)
    noise = DecodeNoise(DECODE_TIMESTEP) if decoder.takes_noise else None
    delivery = Delivery(with_planes=hands_out)

    def step() -> Velocities:
        kept: list[Tensor] = []
        for chunk in decode_frames(decoder, latent_BCFHW, RenderShape(pixels, pixels), noise=noise, delivery=delivery):
            kept.append(torch.from_numpy(chunk.planes[-1:]))
        return (torch.cat(kept) if hands_out else None), None

    return step
