"""What a convolution gave, and its bias, and what went round it: one sum in one pass, in place.

    x += bias + parts

x (B, C, F, H, W) and the parts (B, C, f, H, W), which lie one after the other along F and may be none, are of float32,
bfloat16 or float16; their samples lie as `torch.channels_last_3d`. bias (C). The sum is in float32, rounded once. A
convolution's own bias is added by a pass of one number a thread, and what goes round it by another.

Defined by `kernels.reference_pictures.add_with_bias_`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import require_channels_last

# Numbers that a program holds: of 16 bits 32 bytes a thread, of each of two tensors.
BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _add_with_bias_kernel(
    x, bias, part, num_places, x_sample_stride, part_sample_stride, C: tl.constexpr, PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * PLACES
    sample = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, PLACES)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    mask = (first + place < num_places) & (channel < C)
    at = place * C + channel
    x_at = x + sample * x_sample_stride + first * C + at
    values = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    # Loaded for each place, so that each thread has those of its own numbers.
    mine = tl.zeros_like(place) + channel
    values += tl.load(bias + mine, mask=mine < C, other=0.0).to(tl.float32)
    if part is not None:
        part_at = part + sample * part_sample_stride + first * C + at
        values += tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_at, values.to(x.dtype.element_ty), mask=mask)


def add_with_bias_(x_BCFHW: Tensor, bias_C: Tensor, parts_BCFHW: Sequence[Tensor]) -> Tensor:
    """`kernels.reference_pictures.add_with_bias_` on a GPU. ValueError if channels of x or a part do not lie last."""
    require_channels_last("x_BCFHW", x_BCFHW)
    if not parts_BCFHW:
        _launch(x_BCFHW, bias_C, None)
    begin = 0
    for part in parts_BCFHW:
        require_channels_last("every part", part)
        _launch(x_BCFHW.narrow(2, begin, part.shape[2]), bias_C, part)
        begin += part.shape[2]
    return x_BCFHW


def _launch(x_BCFHW: Tensor, bias_C: Tensor, part_BCFHW: Tensor | None) -> None:
    samples, channels, *sides = x_BCFHW.shape
    num_places = sides[0] * sides[1] * sides[2]
    width = triton.next_power_of_2(channels)
    places = max(1, BLOCK // width)
    part_stride = 0 if part_BCFHW is None else part_BCFHW.stride(0)
    _add_with_bias_kernel[(triton.cdiv(num_places, places), samples)](
        x_BCFHW, bias_C, part_BCFHW, num_places, x_BCFHW.stride(0), part_stride, C=channels, PLACES=places, WIDTH=width,
        num_warps=NUM_WARPS,
    )  # fmt: skip
