"""RMS norm of each token, then scale and shift; written as it is or as float8 rows with their scales.

    y = x / sqrt(mean(x^2 over D) + eps) * (1 + scale[row of token]) + shift[row of token]

x (B, T, D), contiguous, of float32, bfloat16 or float16; scale and shift (B or 1, N, D) of any of these, their last
dimension contiguous; index (B or 1, T) int64 or None. All arithmetic is float32; y is rounded once to the dtype of x,
and for float8 a second time, so both forms are the same numbers. x is read once and y written once: one program a
token holds the whole row in registers.

Defined by `kernels.reference.modulated_rms_norm`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantise_rows import scaled_row
from kernels.rows import ScaledRows, empty_rows, num_warps_for, require_contiguous, table_of_rows


@triton.jit
def normed_and_modulated(x, scale_at, shift_at, mask, eps, D: tl.constexpr):
    """The formula for one row in registers; pointers to the row's scale and shift, or None for a plain norm."""
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    if scale_at is not None:
        scale = tl.load(scale_at, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_at, mask=mask, other=0.0).to(tl.float32)
        y = y * (1.0 + scale) + shift
    return y


@triton.jit
def row_of_token(index, sample, token_row, sample_stride, row_stride):
    """Where the token's row of a table begins; the sample's only row if there is no index."""
    offset = sample * sample_stride
    if index is not None:
        offset += tl.load(index + token_row) * row_stride
    return offset


@triton.jit
def _modulated_rms_norm_kernel(
    x, scale, shift, index, y, y_scale, num_tokens, sample_stride, row_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr
):
    token_row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < D
    at = token_row * D + channel
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale_at, shift_at = None, None
    if scale is not None:
        table_at = row_of_token(index, token_row // num_tokens, token_row, sample_stride, row_stride) + channel
        scale_at = scale + table_at
        shift_at = shift + table_at
    values = normed_and_modulated(values, scale_at, shift_at, mask, eps, D).to(x.dtype.element_ty)
    if y_scale is not None:
        values, peak_scale = scaled_row(values)
        tl.store(y_scale + token_row, peak_scale)
    tl.store(y + at, values, mask=mask)


def modulated_rms_norm(
    x_BTD: Tensor, scale_BND: Tensor, shift_BND: Tensor, index_BT: Tensor | None, eps: float
) -> Tensor:
    """`kernels.reference.modulated_rms_norm` on a GPU. ValueError if x is not contiguous."""
    y_BTD = torch.empty_like(x_BTD)
    _launch(x_BTD, (scale_BND, shift_BND), index_BT, eps, y_BTD, None)
    return y_BTD


def modulated_rms_norm_quantised(
    x_BTD: Tensor, scale_BND: Tensor, shift_BND: Tensor, index_BT: Tensor | None, eps: float
) -> ScaledRows:
    """`kernels.reference.modulated_rms_norm_quantised` on a GPU. ValueError if x is not contiguous."""
    rows = empty_rows(x_BTD)
    _launch(x_BTD, (scale_BND, shift_BND), index_BT, eps, rows.values_BTD, rows.scale_BT1)
    return rows


def rms_norm(x_BTD: Tensor, eps: float) -> Tensor:
    """`kernels.reference.rms_norm` on a GPU. ValueError if x is not contiguous."""
    y_BTD = torch.empty_like(x_BTD)
    _launch(x_BTD, None, None, eps, y_BTD, None)
    return y_BTD


def _launch(
    x_BTD: Tensor,
    modulation: tuple[Tensor, Tensor] | None,
    index_BT: Tensor | None,
    eps: float,
    y_BTD: Tensor,
    y_scale_BT1: Tensor | None,
) -> None:
    require_contiguous("x_BTD", x_BTD)
    num_samples, num_tokens, width = x_BTD.shape
    table = table_of_rows(modulation, index_BT, x_BTD)
    block = triton.next_power_of_2(width)
    _modulated_rms_norm_kernel[(num_samples * num_tokens,)](
        x_BTD, *table.tensors, table.index_BT, y_BTD, y_scale_BT1, num_tokens, *table.strides, eps,
        D=width, BLOCK=block, num_warps=num_warps_for(block),
    )  # fmt: skip
