"""The frames of a clip as one array: the bytes that are handed out, and the colours that they were made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.engine import RenderEngine, Streams
from pipeline.records.frames import YuvFrames


def planes_of(chunks: Iterable[YuvFrames]) -> np.ndarray:
    """uint8 (F, 3H/2, W)."""
    return np.concatenate([chunk.planes for chunk in chunks])


def rgb_of(engine: RenderEngine, streams: Streams) -> np.ndarray:
    """uint8 (F, H, W, 3) of red, green and blue before they become luma and chroma, which would blur them."""
    decoder, ops = engine.video_decoder, engine.video_decoder.ops
    seen: list[Tensor] = []

    def convert(video_CFHW: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(((video_CFHW.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return ops.rgb_to_yuv420(video_CFHW)

    decoder.ops = dataclasses.replace(ops, rgb_to_yuv420=convert)
    try:
        for _ in streams.frames:
            pass
    finally:
        decoder.ops = ops
    return torch.cat(seen, dim=1).permute(1, 2, 3, 0).numpy()
