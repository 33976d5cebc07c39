"""The order in which video tokens go through the denoiser: near in time and space, near in the sequence.

Row after row, 128 tokens are two thin lines of a picture; in tiles they are a small box of the clip. Attention with
rotary positions does not care about order, so nothing but rounding depends on it. Which blocks attend to which is in
`sparse_attention.py`.

Shape suffixes: B batch, T video tokens, C channels of a latent token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.model.streams import DistinctTimesteps, TokenStream

Box = tuple[int, int, int]
"""Frames, rows and columns of tokens that lie one after the other in the raster order, columns fastest."""

TILE: Box = (4, 6, 6)
"""About a block of 128 tokens, which is what a tile should fill: with it 16x34x60 latents fall into tiles of 127.5."""


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of a stream's tokens: place i of the new order is token `source_T[i]` of the old one."""

    source_T: Tensor
    back_T: Tensor

    @classmethod
    def from_source(cls, source_T: Tensor) -> TokenOrder:
        """The order with this source (int64), and its inverse."""
        return cls(source_T, source_T.argsort())

    def apply(self, stream: TokenStream) -> TokenStream:
        """The stream with all that belongs to a token in the new order."""
        mask_BTT, keyframes_BT = stream.attention_mask_BTT, stream.keyframes_mask_BT
        index_BT = stream.timesteps.index_BT
        return replace(
            stream,
            tokens_BTC=stream.tokens_BTC[:, self.source_T],
            timesteps=DistinctTimesteps(
                stream.timesteps.values_BK, None if index_BT is None else index_BT[:, self.source_T]
            ),
            positions_BAT2=stream.positions_BAT2[:, :, self.source_T],
            attention_mask_BTT=None if mask_BTT is None else mask_BTT[:, self.source_T][:, :, self.source_T],
            keyframes_mask_BT=None if keyframes_BT is None else keyframes_BT[:, self.source_T],
        )

    def undo(self, x_BTC: Tensor) -> Tensor:
        """What was computed of the tokens, in the old order."""
        return x_BTC[:, self.back_T]


def tile_order(boxes: Sequence[Box], *, tile: Box = TILE, device: torch.device | str = "cpu") -> TokenOrder:
    """The tokens of each box in turn, tile after tile of it.

    A box is cut evenly into the number of tiles that comes nearest to the wanted size, so there are no slivers at its
    ends; the way through the tiles turns back at each end, so that those which follow each other touch.
    """
    sources, first = [], 0
    for box in boxes:
        sources.append(_tiled(box, tile, device) + first)
        first += box[0] * box[1] * box[2]
    return TokenOrder.from_source(torch.cat(sources))


def _tiled(box: Box, tile: Box, device: torch.device | str) -> Tensor:
    _, num_rows, num_columns = parts = [max(1, round(size / wanted)) for size, wanted in zip(box, tile, strict=True)]
    grid = torch.meshgrid(*(torch.arange(size, device=device) for size in box), indexing="ij")
    # Which tile along each axis, cut evenly.
    frame_T, row_T, column_T = (
        places.flatten() * number // size for places, number, size in zip(grid, parts, box, strict=True)
    )
    row_T = torch.where(frame_T % 2 == 1, num_rows - 1 - row_T, row_T)
    line_T = frame_T * num_rows + row_T
    column_T = torch.where(line_T % 2 == 1, num_columns - 1 - column_T, column_T)
    return (line_T * num_columns + column_T).argsort(stable=True)
