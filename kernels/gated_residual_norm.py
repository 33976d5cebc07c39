"""A branch added to its tokens through a gate, and the norm that follows, in one pass over both.

    x' = x + branch * gate[row of token], rounded to the dtype of x
    y  = x' / sqrt(mean(x'^2 over D) + eps) * (1 + scale[row of token]) + shift[row of token]

x and branch (B, T, D), contiguous, of float32, bfloat16 or float16; gate, or None for 1, and scale and shift, or None
for 0, are tables of (B or 1, N, D). All arithmetic is float32. Two tensors are read and two written, where the steps
one by one read three; y may be float8 rows with their scales. One program a token holds the row in registers.

Defined by `kernels.reference.gated_residual_norm`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.modulated_rms_norm import normed_and_modulated, row_of_token
from kernels.quantise_rows import scaled_row
from kernels.rows import Modulation, ScaledRows, empty_rows, num_warps_for, require_contiguous, table_of_rows


@triton.jit
def _gated_residual_norm_kernel(
    x, branch, gate, gate_index, scale, shift, index, x_out, y, y_scale, num_tokens, gate_sample_stride,
    gate_row_stride, sample_stride, row_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token_row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < D
    at = token_row * D + channel
    sample = token_row // num_tokens
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        gate_at = row_of_token(gate_index, sample, token_row, gate_sample_stride, gate_row_stride) + channel
        added *= tl.load(gate + gate_at, mask=mask, other=0.0).to(tl.float32)
    rounded = (values + added).to(x.dtype.element_ty)
    tl.store(x_out + at, rounded, mask=mask)
    if y is not None:
        scale_at, shift_at = None, None
        if scale is not None:
            table_at = row_of_token(index, sample, token_row, sample_stride, row_stride) + channel
            scale_at = scale + table_at
            shift_at = shift + table_at
        normed = normed_and_modulated(rounded.to(tl.float32), scale_at, shift_at, mask, eps, D)
        normed = normed.to(x.dtype.element_ty)
        if y_scale is not None:
            normed, peak_scale = scaled_row(normed)
            tl.store(y_scale + token_row, peak_scale)
        tl.store(y + at, normed, mask=mask)


def gated_residual(x_BTD: Tensor, branch_BTD: Tensor, gate_BND: Tensor | None, index_BT: Tensor | None) -> Tensor:
    """`kernels.reference.gated_residual` on a GPU. ValueError if x or the branch is not contiguous."""
    return _launch(x_BTD, branch_BTD, (gate_BND, index_BT), None, 0.0, None, None)


def gated_residual_norm(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BND: Tensor | None,
    gate_index_BT: Tensor | None,
    modulation: Modulation | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`kernels.reference.gated_residual_norm` on a GPU. ValueError if x or the branch is not contiguous."""
    y_BTD = torch.empty_like(x_BTD)
    return _launch(x_BTD, branch_BTD, (gate_BND, gate_index_BT), modulation, eps, y_BTD, None), y_BTD


def gated_residual_norm_quantised(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BND: Tensor | None,
    gate_index_BT: Tensor | None,
    modulation: Modulation | None,
    eps: float,
) -> tuple[Tensor, ScaledRows]:
    """`kernels.reference.gated_residual_norm_quantised` on a GPU. ValueError if x or the branch is not contiguous."""
    rows = empty_rows(x_BTD)
    gate = (gate_BND, gate_index_BT)
    return _launch(x_BTD, branch_BTD, gate, modulation, eps, rows.values_BTD, rows.scale_BT1), rows


def _launch(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate: tuple[Tensor | None, Tensor | None],
    modulation: Modulation | None,
    eps: float,
    y_BTD: Tensor | None,
    y_scale_BT1: Tensor | None,
) -> Tensor:
    require_contiguous("x_BTD", x_BTD)
    require_contiguous("branch_BTD", branch_BTD)
    if branch_BTD.shape != x_BTD.shape:
        raise ValueError(f"branch_BTD must be {tuple(x_BTD.shape)} like x_BTD, got {tuple(branch_BTD.shape)}")
    num_samples, num_tokens, width = x_BTD.shape
    gate_BND, gate_index_BT = gate
    gates = table_of_rows(None if gate_BND is None else (gate_BND,), gate_index_BT, x_BTD)
    table = table_of_rows(None if modulation is None else modulation[:2], modulation and modulation.index_BT, x_BTD)
    x_out_BTD = torch.empty_like(x_BTD)
    block = triton.next_power_of_2(width)
    _gated_residual_norm_kernel[(num_samples * num_tokens,)](
        x_BTD, branch_BTD, gates.tensors[0], gates.index_BT, *table.tensors, table.index_BT, x_out_BTD, y_BTD,
        y_scale_BT1, num_tokens, *gates.strides, *table.strides, eps,
        D=width, BLOCK=block, num_warps=num_warps_for(block),
    )  # fmt: skip
    return x_out_BTD
