"""Decoded pictures to the bytes that an encoder takes: limited-range BT.709 at 4:2:0, in one pass.

    Y = 16 + 219 L;   U = 128 + 224 (B' - L) / 1.8556;   V = 128 + 224 (R' - L) / 1.5748

x (3, F, H, W) in [-1,1], of float32, bfloat16 or float16 and of any strides, so that a crop is not copied; H and W
even. All arithmetic is float32, halves are rounded up. A byte and a half a pixel is written where red, green and blue
take three, and no picture in float32 ever is. What is not finite is counted on the way. One program makes a stretch of
one row of U and V, and the two rows of Y that it lies between.

Defined by `kernels.reference_pictures.rgb_to_yuv420`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Samples of U in one program: a warp's threads take four columns each of both rows.
BLOCK = 128


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x * 0.5 + 0.5, 0.0), 1.0)


@triton.jit
def _luma(red, green, blue):
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@triton.jit
def _byte(value):
    return (value + 0.5).to(tl.int32).to(tl.uint8)


@triton.jit
def _channel(row_at, column, mask, column_stride):
    """One channel of one row: on even columns, on odd ones, their 1:2:1 mean, and how many are not finite."""
    on_column = tl.load(row_at + 2 * column * column_stride, mask=mask, other=0.0).to(tl.float32)
    after = tl.load(row_at + (2 * column + 1) * column_stride, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(row_at + tl.maximum(2 * column - 1, 0) * column_stride, mask=mask, other=0.0).to(tl.float32)
    # Not a number is not less than anything.
    finite = (tl.abs(on_column) < float("inf")).to(tl.int32) + (tl.abs(after) < float("inf")).to(tl.int32)
    on_column, after, before = _unit(on_column), _unit(after), _unit(before)
    return on_column, after, (before + after) * 0.25 + on_column * 0.5, 2 - finite


@triton.jit
def _two_rows_of_luma(x, y, num_wrong, column, mask, channel_stride, row_stride, column_stride, W):
    """Writes both rows of Y; gives the mean red, green and blue of each sample of U and V."""
    red_mean = tl.zeros_like(column).to(tl.float32)
    green_mean, blue_mean = red_mean, red_mean
    wrong = tl.zeros_like(column)
    for row in tl.static_range(2):
        at = x + row * row_stride
        red, red_after, red_row, red_wrong = _channel(at, column, mask, column_stride)
        green, green_after, green_row, green_wrong = _channel(at + channel_stride, column, mask, column_stride)
        # Twice the stride of a long clip's channels would not fit the 32 bits that the stride itself fits.
        at = at + channel_stride + channel_stride
        blue, blue_after, blue_row, blue_wrong = _channel(at, column, mask, column_stride)
        y_at = y + row * W + 2 * column
        tl.store(y_at, _byte(16.0 + 219.0 * _luma(red, green, blue)), mask=mask)
        tl.store(y_at + 1, _byte(16.0 + 219.0 * _luma(red_after, green_after, blue_after)), mask=mask)
        red_mean += red_row * 0.5
        green_mean += green_row * 0.5
        blue_mean += blue_row * 0.5
        wrong += red_wrong + green_wrong + blue_wrong
    total_wrong = tl.sum(wrong, axis=0)
    if total_wrong > 0:
        tl.atomic_add(num_wrong, total_wrong)
    return red_mean, green_mean, blue_mean


@triton.jit
def _rgb_to_yuv420_kernel(
    x, planes, num_wrong, H, W, channel_stride, frame_stride, row_stride, column_stride, U_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chroma_row = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(2).to(tl.int64)
    mask = column < W // 2
    y = planes + frame * (H * W * 3 // 2)
    red, green, blue = _two_rows_of_luma(
        x + frame * frame_stride + 2 * chroma_row * row_stride, y + 2 * chroma_row * W, num_wrong, column, mask,
        channel_stride, row_stride, column_stride, W,
    )  # fmt: skip
    luma = _luma(red, green, blue)
    u_at = y + H * W + chroma_row * (W // 2) + column
    tl.store(u_at, _byte(128.0 + (blue - luma) * U_SCALE), mask=mask)
    tl.store(u_at + (H // 2) * (W // 2), _byte(128.0 + (red - luma) * V_SCALE), mask=mask)


def rgb_to_yuv420(video_CFHW: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.reference_pictures.rgb_to_yuv420` on a GPU."""
    _, num_frames, height, width = video_CFHW.shape
    planes_FRW = torch.empty(num_frames, height * 3 // 2, width, dtype=torch.uint8, device=video_CFHW.device)
    num_wrong = torch.zeros(1, dtype=torch.int32, device=video_CFHW.device)
    _rgb_to_yuv420_kernel[(triton.cdiv(width // 2, BLOCK), height // 2, num_frames)](
        video_CFHW, planes_FRW, num_wrong, height, width, *video_CFHW.stride(),
        U_SCALE=224 / 1.8556, V_SCALE=224 / 1.5748, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    return planes_FRW, num_wrong
