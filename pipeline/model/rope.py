"""Rotary tables from positions: what turns where and when a token is into rotations of queries and keys.

Tables depend on positions only, so a clip computes them once for all its steps. The rotation itself is an operation
(`kernels.reference.qk_norm_rope`).

Shape suffixes: B batch (1 if all samples share positions), A position axes, T tokens, P half of a head's channels,
F frequencies of one axis, R places that differ; the last 2 of positions is [start, end).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.rows import Rotary
from pipeline.model.hparams import RotaryHparams
from pipeline.model.share import WHOLE, Share


def rotary_table(
    positions_BAT2: Tensor,
    max_positions: tuple[int, ...],
    num_heads: int,
    width: int,
    rotary: RotaryHparams,
    share: Share = WHOLE,
) -> Rotary:
    """Rotations of a share of the heads of queries or keys of `width` = num_heads * 2P channels.

    `positions_BAT2` holds [start, end) of each token along each axis, in the unit of `max_positions`. The frequencies
    run over the whole width, frequency first and axis second, behind a padding that does not rotate; only then are they
    cut into heads, so heads differ in their frequencies. Finding the places that differ waits for an accelerator.
    """
    num_axes = positions_BAT2.shape[1]
    if len(max_positions) != num_axes:
        raise ValueError(f"positions must have {len(max_positions)} axes, got {num_axes}")
    start_BAT, end_BAT = positions_BAT2.float().unbind(dim=-1)
    place_BTA = (start_BAT if rotary.at_start else (start_BAT + end_BAT) / 2).transpose(1, 2)
    extent_A = torch.tensor(max_positions, dtype=torch.float32, device=place_BTA.device)
    # Angles reach 15,000 rad, where one float32 step is 0.001: the order of these products is part of the model.
    frequencies_F = _frequencies(width // (2 * num_axes), rotary).to(place_BTA.device)
    turns, rows, num_places = [], [], 0
    for place_BT, extent in zip(place_BTA.unbind(dim=2), extent_A, strict=True):
        place_R, row_BT = torch.unique(place_BT, return_inverse=True)
        angle_RF = ((place_R / extent) * 2 - 1)[:, None] * frequencies_F
        turns.append(torch.stack((angle_RF.cos(), angle_RF.sin()), dim=-1))
        rows.append(row_BT + num_places)
        num_places += len(place_R)
    num_pairs, padding = width // num_heads // 2, width // 2 - len(frequencies_F) * num_axes
    first_pair = share.of(num_heads).start * num_pairs
    return Rotary(torch.cat(turns), torch.stack(rows, dim=-1).int(), first_pair - padding)


def _frequencies(number: int, rotary: RotaryHparams) -> Tensor:
    """theta^(0..1) * pi/2, (F,). A float64 grid is rounded last, which a float32 grid does not reproduce."""
    dtype = torch.float64 if rotary.float64_grid else torch.float32
    exponent_F = torch.linspace(0.0, 1.0, number, dtype=dtype)
    return (torch.pow(rotary.theta, exponent_F) * (math.pi / 2)).float()
