"""What a convolution of a video takes: frames in a margin, on the way RMS norm over channels, scale and shift, SiLU.

    z = x + bias;   y = z / sqrt(mean(z^2 over C) + eps) * (1 + scale) + shift;   result = y sigmoid(y)

x comes in parts (B, C, f, H, W) of float32, bfloat16 or float16, one after the other along F, whose samples lie as
`torch.channels_last_3d`: what some layer gave, or some of its frames. The result (B, C, F, H + 2 rows, W + 2 columns)
lies so too; its margin is zeros, or what lies as far within the edge, as convolutions reflect. bias (C), scale and
shift (B, C, 1, 1, 1) may be None. All arithmetic is float32, rounded once.

Every place of the result is written once and reads one place of x, so a margin costs its own writes. One program makes
a stretch of one row, with the channels of each place in registers; one launch makes the frames of one part.

Defined by `framed_norm_silu` and `framed` of `kernels.reference_pictures`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import require_channels_last

# Numbers that a program holds: of 16 bits 32 bytes a thread.
BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _source(at, size, MARGIN: tl.constexpr, REFLECTS: tl.constexpr):
    """The row or column that is written to `at` of a framed side; without reflection perhaps outside of it."""
    source = at - MARGIN
    if REFLECTS:
        source = tl.abs(source)
        source = tl.minimum(source, 2 * (size - 1) - source)
    return source


@triton.jit
def _framed_norm_silu_kernel(
    x, bias, scale, shift, y, num_frames, x_sample_stride, y_sample_stride, H, W, eps, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REFLECTS: tl.constexpr, NORMS: tl.constexpr, PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[:, None]
    row = tl.program_id(1)
    sample, frame = tl.program_id(2) // num_frames, tl.program_id(2) % num_frames
    channel = tl.arange(0, WIDTH)[None, :]
    is_channel = channel < C
    from_column, from_row = _source(column, W, COLUMNS, REFLECTS), _source(row, H, ROWS, REFLECTS)
    inside = (from_column >= 0) & (from_column < W) & (from_row >= 0) & (from_row < H)
    # Rows begin anywhere in tensors of more than 2^31 numbers; within a row 32 bits are enough.
    x_row = x + sample.to(tl.int64) * x_sample_stride + (frame.to(tl.int64) * H + from_row) * W * C
    values = tl.load(x_row + (from_column * C + channel), mask=inside & is_channel, other=0.0).to(tl.float32)
    if NORMS:
        # Rows of channels are loaded for each place, so that each thread has those of its own numbers.
        mine = tl.zeros_like(column) + channel
        if bias is not None:
            values += tl.load(bias + mine, mask=mine < C, other=0.0).to(tl.float32)
        values = values * tl.rsqrt(tl.sum(values * values, axis=1) / C + eps)[:, None]
        if scale is not None:
            at = sample * C + mine
            factor = 1.0 + tl.load(scale + at, mask=mine < C, other=0.0).to(tl.float32)
            values = values * factor + tl.load(shift + at, mask=mine < C, other=0.0).to(tl.float32)
        values = values * tl.sigmoid(values)
        if not REFLECTS:
            values = tl.where(inside, values, 0.0)
    full_width = W + 2 * COLUMNS
    y_row = y + sample.to(tl.int64) * y_sample_stride
    y_row += (frame.to(tl.int64) * (H + 2 * ROWS) + row) * full_width * C
    mask = (column < full_width) & is_channel
    tl.store(y_row + (column * C + channel), values.to(y.dtype.element_ty), mask=mask)


def framed_norm_silu(
    parts_BCFHW: Sequence[Tensor],
    bias_C: Tensor | None,
    modulation: tuple[Tensor, Tensor] | None,
    eps: float,
    margin: tuple[int, int],
    reflects: bool,
) -> Tensor:
    """`kernels.reference_pictures.framed_norm_silu` on a GPU. ValueError if the channels of a part do not lie last."""
    scale, shift = (None, None) if modulation is None else (row.contiguous() for row in modulation)
    return _launched(parts_BCFHW, (bias_C, scale, shift), eps, margin, reflects=reflects)


def framed(parts_BCFHW: Sequence[Tensor], margin: tuple[int, int], reflects: bool) -> Tensor:
    """`kernels.reference_pictures.framed` on a GPU. ValueError if the channels of a part do not lie last."""
    return _launched(parts_BCFHW, (None, None, None), None, margin, reflects=reflects)


def _launched(
    parts: Sequence[Tensor],
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float | None,
    margin: tuple[int, int],
    *,
    reflects: bool,
) -> Tensor:
    """Without `eps` no norm and no activation."""
    first = parts[0]
    samples, channels, _, height, width = first.shape
    if reflects and (margin[0] >= height or margin[1] >= width):
        raise ValueError(f"margin must be less than the sides {(height, width)} that it reflects, got {margin}")
    size = (samples, channels, sum(part.shape[2] for part in parts), height + 2 * margin[0], width + 2 * margin[1])
    y_BCFHW = torch.empty(size, dtype=first.dtype, device=first.device, memory_format=torch.channels_last_3d)
    block = triton.next_power_of_2(channels)
    places, begin = max(1, BLOCK // block), 0
    for part in parts:
        require_channels_last("every part", part)
        num_frames = part.shape[2]
        into = y_BCFHW[:, :, begin : begin + num_frames]
        begin += num_frames
        _framed_norm_silu_kernel[(triton.cdiv(size[4], places), size[3], samples * num_frames)](
            part, *rows, into, num_frames, part.stride(0), into.stride(0), height, width, 0.0 if eps is None else eps,
            C=channels, ROWS=margin[0], COLUMNS=margin[1], REFLECTS=reflects, NORMS=eps is not None, PLACES=places,
            WIDTH=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y_BCFHW
