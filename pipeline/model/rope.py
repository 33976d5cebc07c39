"""Rotary tables from positions: what turns where and when a token is into rotations of queries and keys.

Tables depend on positions only, so a clip computes them once for all its steps. The rotation itself is an operation
(`kernels.reference.qk_norm_rope`).

Shape suffixes: B batch (1 if all samples share positions), A position axes, T tokens, H heads, P half of a head's
channels, F frequencies of one axis; 2 is [start, end).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model.hparams import RotaryHparams
from pipeline.model.share import WHOLE, Share


class RotaryTable(NamedTuple):
    """Cosine and sine of every rotation, float32, (B, H, T, P) each."""

    cos_BHTP: Tensor
    sin_BHTP: Tensor


def rotary_table(
    positions_BAT2: Tensor,
    max_positions: tuple[int, ...],
    num_heads: int,
    width: int,
    rotary: RotaryHparams,
    share: Share = WHOLE,
) -> RotaryTable:
    """Table for a share of the heads of queries or keys of `width` = num_heads * 2P channels.

    `positions_BAT2` holds [start, end) of each token along each axis, in the unit of `max_positions`. The frequencies
    run over the whole width, frequency first and axis second, behind a padding that does not rotate; only then are they
    cut into heads, so heads differ in their frequencies.
    """
    num_axes = positions_BAT2.shape[1]
    if len(max_positions) != num_axes:
        raise ValueError(f"positions must have {len(max_positions)} axes, got {num_axes}")
    start_BAT, end_BAT = positions_BAT2.float().unbind(dim=-1)
    place_BTA = (start_BAT if rotary.at_start else (start_BAT + end_BAT) / 2).transpose(1, 2)
    extent_A = torch.tensor(max_positions, dtype=torch.float32, device=place_BTA.device)
    # Angles reach 15,000 rad, where one float32 step is 0.001: the order of these products is part of the model.
    frequencies_F = _frequencies(width // (2 * num_axes), rotary).to(place_BTA.device)
    angle_BTFA = ((place_BTA / extent_A) * 2 - 1)[:, :, None, :] * frequencies_F[:, None]
    angle_BTR = angle_BTFA.flatten(2)
    padding = (width // 2 - angle_BTR.shape[-1], 0)
    cos_BTR = functional.pad(angle_BTR.cos(), padding, value=1.0)
    sin_BTR = functional.pad(angle_BTR.sin(), padding, value=0.0)
    heads = share.of(num_heads)
    return RotaryTable(*(_cut_into_heads(table_BTR, num_heads, heads) for table_BTR in (cos_BTR, sin_BTR)))


def _frequencies(number: int, rotary: RotaryHparams) -> Tensor:
    """theta^(0..1) * pi/2, (F,). A float64 grid is rounded last, which a float32 grid does not reproduce."""
    dtype = torch.float64 if rotary.float64_grid else torch.float32
    exponent_F = torch.linspace(0.0, 1.0, number, dtype=dtype)
    return (torch.pow(rotary.theta, exponent_F) * (math.pi / 2)).float()


def _cut_into_heads(table_BTR: Tensor, num_heads: int, heads: slice) -> Tensor:
    return table_BTR.unflatten(-1, (num_heads, -1))[:, :, heads].transpose(1, 2).contiguous()
