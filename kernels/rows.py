"""Rows of channels as values: what modulates them, what they are in float8; and what launchers of kernels check.

Shape suffixes are those of `kernels.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScaledRows(NamedTuple):
    """Tokens as float8 e4m3 numbers with one float32 scale a token: x is about values * scale, rounded to `dtype`.

    `values_BTD` (B, T, D), `scale_BT1` (B, T, 1); `dtype` is that of the tensor they stand for, and of what a linear
    layer makes of them.
    """

    values_BTD: Tensor
    scale_BT1: Tensor
    dtype: torch.dtype


class Modulation(NamedTuple):
    """What follows a norm: tables of (B or 1, N, D), and each token's row in both, (B or 1, T); None if N is 1."""

    scale_BND: Tensor
    shift_BND: Tensor
    index_BT: Tensor | None


class Table(NamedTuple):
    """Rows that tokens look up: tensors of one layout (or None), each token's row, strides of sample and row."""

    tensors: tuple[Tensor | None, ...]
    index_BT: Tensor | None
    strides: tuple[int, int]


def table_of_rows(tensors: tuple[Tensor, ...] | None, index_BT: Tensor | None, x_BTD: Tensor) -> Table:
    """Tables of (B or 1, N, D) made ready for the tokens of x. ValueError if a shape does not fit."""
    if tensors is None:
        return Table((None, None), None, (0, 0))
    num_samples, num_tokens, width = x_BTD.shape
    for rows_BND in tensors:
        if rows_BND.shape[0] not in (1, num_samples) or rows_BND.shape[2] != width:
            raise ValueError(f"rows must be (1 or {num_samples}, N, {width}), got {tuple(rows_BND.shape)}")
        if index_BT is None and rows_BND.shape[1] != 1:
            raise ValueError(f"rows must be one a sample when there is no index, got {rows_BND.shape[1]}")
    expanded = [rows_BND.expand(num_samples, -1, -1) for rows_BND in tensors]
    # Rows are slices of one tensor as a rule, and then of one layout.
    if len({rows_BND.stride() for rows_BND in expanded}) > 1 or expanded[0].stride(2) != 1:
        expanded = [rows_BND.contiguous() for rows_BND in expanded]
    if index_BT is not None:
        index_BT = index_BT.expand(num_samples, num_tokens).contiguous()
    return Table(tuple(expanded), index_BT, (expanded[0].stride(0), expanded[0].stride(1)))


def require_contiguous(name: str, x: Tensor) -> None:
    """ValueError unless x lies row after row, which is how a kernel reads it."""
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(x.shape)} of strides {x.stride()}")


def require_channels_last(name: str, x_BCFHW: Tensor) -> None:
    """ValueError unless each sample of x lies place after place, the channels of each next to each other.

    So do some frames of a tensor that is `torch.channels_last_3d`, of however many samples.
    """
    if not x_BCFHW[:1].is_contiguous(memory_format=torch.channels_last_3d):
        raise ValueError(
            f"{name} must be torch.channels_last_3d, got shape {tuple(x_BCFHW.shape)} of strides {x_BCFHW.stride()}"
        )


def empty_rows(x_BTD: Tensor) -> ScaledRows:
    """Float8 rows for the tokens of x, yet to be written."""
    scale_BT1 = torch.empty(*x_BTD.shape[:-1], 1, dtype=torch.float32, device=x_BTD.device)
    return ScaledRows(torch.empty_like(x_BTD, dtype=torch.float8_e4m3fn), scale_BT1, x_BTD.dtype)


def num_warps_for(block: int) -> int:
    """Warps of a program that holds `block` channels: 32 of them a thread, so that each loads 16 bytes four times.

    On one H200 half as many threads took 0.115 ms for a quantised norm of 32,640 rows of 4,096, these twice as many
    0.133; others differ by less than a twentieth.
    """
    return max(1, min(16, block // 1024))
