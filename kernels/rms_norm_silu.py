"""RMS norm over the channels of each place of a video, scale and shift, and SiLU, in one pass.

    y = x / sqrt(mean(x^2 over C) + eps) * (1 + scale) + shift;   result = y sigmoid(y)

x (B, C, F, H, W) of float32, bfloat16 or float16, whose channels lie next to each other in memory
(`torch.channels_last_3d`); scale and shift (B, C, 1, 1, 1) or None. All arithmetic is float32, rounded once. x is read
once and the result, which lies as x does, written once: one program holds the channels of some places in registers.

Defined by `kernels.reference.rms_norm_silu`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program holds: of 16 bits 32 bytes a thread.
BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _kernel(
    x, scale, shift, y, num_places, places_of_sample, eps, C: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    mask = (place < num_places) & (channel < C)
    values = tl.load(x + place * C + channel, mask=mask, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values, axis=1) / C + eps)[:, None]
    if scale is not None:
        at = place // places_of_sample * C + channel
        factor = 1.0 + tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
        values = values * factor + tl.load(shift + at, mask=mask, other=0.0).to(tl.float32)
    values = values * tl.sigmoid(values)
    tl.store(y + place * C + channel, values.to(x.dtype.element_ty), mask=mask)


def rms_norm_silu(x_BCFHW: Tensor, modulation: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """`kernels.reference.rms_norm_silu` on a GPU. ValueError if the channels of x do not lie last in memory."""
    if not x_BCFHW.is_contiguous(memory_format=torch.channels_last_3d):
        raise ValueError(
            f"x_BCFHW must be torch.channels_last_3d, got shape {tuple(x_BCFHW.shape)} of strides {x_BCFHW.stride()}"
        )
    channels = x_BCFHW.shape[1]
    num_places = x_BCFHW.numel() // channels
    scale, shift = (None, None) if modulation is None else (row.contiguous() for row in modulation)
    y_BCFHW = torch.empty_like(x_BCFHW)
    width = triton.next_power_of_2(channels)
    places = max(1, BLOCK // width)
    _kernel[(triton.cdiv(num_places, places),)](
        x_BCFHW, scale, shift, y_BCFHW, num_places, num_places // x_BCFHW.shape[0], eps, C=channels, PLACES=places,
        WIDTH=width, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y_BCFHW
