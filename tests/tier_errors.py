"""What a precision tier costs in fidelity, against the exact tier, on one stage: operators, latents by step, pixels.

With random weights the figures of an operator say what its numbers lose, but attention is nearly even there, so they
say nothing about which blocks of keys may be left out; `pipeline/bench/structured_heads.py` is for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.config.recipe import StageConfig
from pipeline.engine.decode import decode_frames
from pipeline.engine.denoise import Scene, Texts, denoising
from pipeline.engine.engine import RenderEngine
from pipeline.engine.latents import add_noise, unpatchify_video
from pipeline.geometry import PixelShape, RenderShape, latent_shape
from pipeline.model.sparse_attention import SparseAttention

PROMPT = "a lighthouse on a cliff at dusk, waves below"
PEAK_LEVEL = 255.0


@dataclass(frozen=True)
class ErrorReport:
    """Relative L2 error of each layer's sparse attention, worst of all calls; cosine of video latents after each step;
    PSNR of the decoded luma (infinite where it is equal)."""

    attention_error: dict[int, float]
    latent_cosine: list[float]
    decoded_psnr_db: float


@dataclass(frozen=True, eq=False)
class _Rendered:
    latents: list[Tensor]
    luma_FHW: np.ndarray


def error_report(
    load_exact: Callable[[], RenderEngine],
    load_tier: Callable[[], RenderEngine],
    stage: StageConfig,
    pixels: PixelShape,
) -> ErrorReport:
    """Both engines from the same noise, each along its own latents; one is held at a time."""
    exact = _rendered(load_exact(), stage, pixels)
    engine = load_tier()
    with attention_watched(engine) as errors:
        tier = _rendered(engine, stage, pixels)
    cosines = [
        cosine_similarity(got.double().flatten(), wanted.double().flatten(), dim=0).item()
        for got, wanted in zip(tier.latents, exact.latents, strict=True)
    ]
    return ErrorReport(errors, cosines, psnr_db(tier.luma_FHW, exact.luma_FHW))


@torch.inference_mode()
def _rendered(engine: RenderEngine, stage: StageConfig, pixels: PixelShape) -> _Rendered:
    shape, noise = latent_shape(pixels), engine.noise_for(1)
    scene = Scene(shape, Texts(*engine.text.encode_all(PROMPT, "")))
    start = add_noise(engine._empty(shape), noise, stage.levels(shape.num_video_tokens)[0])
    steps = denoising(engine.denoiser, start, scene, stage, noise, shortcuts=engine.shortcuts)
    latents = [step.state.video_BTC.cpu() for step in steps]
    latent_BCFHW = unpatchify_video(latents[-1].to(engine.device), shape)
    frames = decode_frames(engine.video_decoder, latent_BCFHW, RenderShape(pixels, pixels))
    return _Rendered(latents, np.concatenate([chunk.y for chunk in frames]))


@contextmanager
def attention_watched(engine: RenderEngine) -> Iterator[dict[int, float]]:
    """By layer, the largest error of its sparse attention against dense attention over the same inputs; none for layers
    and steps that are dense."""
    errors: dict[int, float] = {}
    slots: dict[int, SparseAttention] = {}
    for layer, block in enumerate(engine.denoiser.blocks):
        attend = block.video.self_attention.attend
        if isinstance(attend, SparseAttention):
            slots[layer] = attend

            def watched(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                bias: Tensor | None,
                layer: int = layer,
                attend: SparseAttention = attend,
            ) -> Tensor:
                got = attend(q, k, v, bias)
                if attend._in_force.pattern is not None:
                    wanted = attend._dense(q, k, v, bias)
                    errors[layer] = max(errors.get(layer, 0.0), relative_error(got, wanted))
                return got

            block.video.self_attention.attend = watched
    try:
        yield errors
    finally:
        for layer, attend in slots.items():
            engine.denoiser.blocks[layer].video.self_attention.attend = attend


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def psnr_db(got: np.ndarray, wanted: np.ndarray) -> float:
    """Of uint8 pictures."""
    square = float(np.mean((got.astype(np.float64) - wanted.astype(np.float64)) ** 2))
    return math.inf if square == 0 else 10 * math.log10(PEAK_LEVEL**2 / square)
