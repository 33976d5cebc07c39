"""From timesteps to the scales, shifts and gates of a step: computed once for each distinct timestep of a sample.

Gathering rows for tokens is left to the operations that use them. How blocks add their own tables is in `block.py`.

Shape suffixes: B batch, K distinct timesteps of a sample, R kinds of row (scale, shift, gate, ...), D channels of the
stream, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SINUSOID_DIM = 256
_MAX_PERIOD = 10000.0


@dataclass(frozen=True, eq=False)
class ExchangeModulation:
    """A stream's part in the audio-video attention; an index is None where all tokens share one row."""

    rows_BK4D: Tensor
    rows_index_BT: Tensor | None
    gate_BKD: Tensor
    gate_index_BT: Tensor | None


@dataclass(frozen=True, eq=False)
class StreamModulation:
    """All modulation of one stream at one step. `index_BT` names each token's row in K; None if there is one row.

    `text_rows_B12D` are the shift and scale of the text; None if the text is not modulated.
    """

    index_BT: Tensor | None
    rows_BKRD: Tensor
    embedded_BKD: Tensor
    text_rows_B12D: Tensor | None
    exchange: ExchangeModulation | None


class TimestepModulation(nn.Module):
    """Timesteps to `num_rows` modulation rows of `width` channels."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.embed_1 = nn.Linear(SINUSOID_DIM, width)
        self.embed_2 = nn.Linear(width, width)
        self.rows = nn.Linear(width, num_rows * width)

    def forward(self, timesteps_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, K, R, D) and the embedded timestep (B, K, D) that the output head adds to its own table.

        `timesteps_BK` is already scaled (0 to 1000).
        """
        sinusoid = timestep_sinusoid(timesteps_BK).to(self.embed_1.weight.dtype)
        embedded_BKD = self.embed_2(functional.silu(self.embed_1(sinusoid)))
        rows_BKRD = self.rows(functional.silu(embedded_BKD)).unflatten(-1, (self.num_rows, -1))
        return rows_BKRD, embedded_BKD


def timestep_sinusoid(timesteps_BK: Tensor) -> Tensor:
    """Cosines, then sines, of 128 geometric frequencies from 1 down to almost 1/10000; float32, (B, K, 256)."""
    half = SINUSOID_DIM // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps_BK.device) * (-math.log(_MAX_PERIOD) / half)
    angle = timesteps_BK.float()[..., None] * exponent.exp()
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
