"""Rows as float8 e4m3 numbers with one scale each, of a tensor as it is or after a tanh GELU.

    scale = max|row| / 448, 1 for a row of zeros;   q = clamp(row / scale, -448, 448) rounded to e4m3

x (..., D), contiguous, of float32, bfloat16 or float16. Peak, quotient (a product with 1 / scale) and GELU are
float32; a GELU is rounded to the dtype of x before it is scaled, so that both forms are the same numbers. Rows of
nothing above 1e-30 count as zeros, since 1 / scale would be infinite soon below. x is read once and a byte a number is
written: one program a row holds it in registers. Where a row is held by several devices this comes in two halves: the
peak of the part that is here, then, once the devices have found the largest of theirs, the numbers.

Defined by the functions of `kernels.reference` of the same names, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN201, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import ScaledRows, empty_rows, num_warps_for, require_contiguous


@triton.jit
def scaled_row(values):
    """One row in registers, zero where it is masked, to float8 numbers and their scale."""
    row = values.to(tl.float32)
    return row_scaled_to(row, tl.max(tl.abs(row), axis=0))


@triton.jit
def row_scaled_to(row, peak):
    """As `scaled_row`, of a float32 row whose peak is known."""
    scale = tl.where(peak > 1e-30, peak / 448.0, 1.0)
    row = row * (1.0 / scale)
    # NaN stays NaN, so that whoever looks at the end sees it.
    row = tl.maximum(row, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(row, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv), scale


@triton.jit
def _gelu_tanh(x):
    # x/2 (1 + tanh(u)) is x / (1 + exp(-2u)), here by the exponential of two, which is the GPU's: -2u/ln 2 is
    # x (a + b x^2) with a = -2 sqrt(2/pi) / ln 2 and b = 0.044715 a.
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * (x * x))))


@triton.jit
def _quantise_rows_kernel(x, peak, y, y_scale, D: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < D
    values = tl.load(x + row * D + channel, mask=mask, other=0.0)
    if GELU:
        values = _gelu_tanh(values.to(tl.float32)).to(x.dtype.element_ty)
    if peak is not None:
        values, scale = row_scaled_to(values.to(tl.float32), tl.load(peak + row))
    else:
        values, scale = scaled_row(values)
    tl.store(y_scale + row, scale)
    tl.store(y + row * D + channel, values, mask=mask)


@triton.jit
def _row_peaks_kernel(x, peak, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    values = tl.load(x + row * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    tl.store(peak + row, tl.max(tl.abs(values), axis=0))


def quantise_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.reference.quantise_rows` on a GPU. ValueError if x is not contiguous."""
    values_MD, scale_M1, _ = _launch(x_MD, gelu=False)
    return values_MD, scale_M1


def gelu_quantised(x_BTD: Tensor) -> ScaledRows:
    """`kernels.reference.gelu_quantised` on a GPU. ValueError if x is not contiguous."""
    return _launch(x_BTD, gelu=True)


def row_peaks(x_MD: Tensor) -> Tensor:
    """`kernels.reference.row_peaks` on a GPU. ValueError if x is not contiguous."""
    require_contiguous("x_MD", x_MD)
    width = x_MD.shape[-1]
    peak_M1 = torch.empty(*x_MD.shape[:-1], 1, dtype=torch.float32, device=x_MD.device)
    block = triton.next_power_of_2(width)
    _row_peaks_kernel[(peak_M1.numel(),)](x_MD, peak_M1, D=width, BLOCK=block, num_warps=num_warps_for(block))
    return peak_M1


def quantise_rows_to(x_MD: Tensor, peak_M1: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.reference.quantise_rows_to` on a GPU. ValueError if x or the peaks are not contiguous."""
    require_contiguous("peak_M1", peak_M1)
    values_MD, scale_M1, _ = _launch(x_MD, gelu=False, peak_M1=peak_M1)
    return values_MD, scale_M1


def _launch(x_BTD: Tensor, gelu: bool, peak_M1: Tensor | None = None) -> ScaledRows:
    require_contiguous("x_BTD", x_BTD)
    rows, width = empty_rows(x_BTD), x_BTD.shape[-1]
    block = triton.next_power_of_2(width)
    _quantise_rows_kernel[(x_BTD.numel() // width,)](
        x_BTD, peak_M1, rows.values_BTD, rows.scale_BT1, D=width, GELU=gelu, BLOCK=block, num_warps=num_warps_for(block)
    )
    return rows
