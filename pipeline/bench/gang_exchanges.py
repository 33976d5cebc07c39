"""What the ranks of a gang exchange of the video in a step, alone: how much of a step is not computing.

Shape suffixes: B batch, H heads, T tokens of a rank, S tokens of a ring's chunk, K channels of a head, D = H K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipeline.geometry import LatentShape
from pipeline.model.hparams import DenoiserHparams
from pipeline.parallel.collectives import heads_for_tokens, pass_on, tokens_for_heads
from pipeline.parallel.layout import Axis, RankGroups
from pipeline.parallel.shards import Shards
from pipeline.parallel.tensor import Reductions


def exchanges(
    groups: RankGroups, hparams: DenoiserHparams, shape: LatentShape, device: str
) -> dict[str, Callable[[], None]]:
    """For each axis of several ranks, a call that does in order what its exchanges of all layers are in a step.

    Of the video's streams only: the audio's are small, and go beside them.
    """
    sequence, tensor = groups.sequence, groups.tensor
    shards = Shards(shape.num_video_tokens, sequence.ring.size, sequence.ulysses.size)
    num_heads, head_dim = hparams.video.num_heads // tensor.size, hparams.video.head_dim
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], None]] = {}
    if sequence.ulysses.size > 1:
        # As projections give them: token by token, heads second.
        x_BHTK = draw(1, shards.part_len, num_heads, head_dim).transpose(1, 2)
        calls["ulysses"] = partial(_heads_and_tokens, x_BHTK, sequence.ulysses, hparams.num_layers)
    if sequence.ring.size > 1:
        x_2BSHK = draw(2, 1, shards.chunk_len, num_heads // sequence.ulysses.size, head_dim)
        calls["ring"] = partial(_round_the_ring, x_2BSHK, sequence.ring, hparams.num_layers)
    if tensor.group is not None:
        x_BTD = torch.zeros(1, shards.part_len, hparams.video.width, device=device, dtype=torch.bfloat16)
        # Self-attention, text attention, feed-forward, and attention to the audio.
        num_sums = 3 + (hparams.audio is not None)
        calls["tensor"] = partial(_sums, x_BTD, Reductions(tensor.group), hparams.num_layers * num_sums)
    return calls


def _heads_and_tokens(x_BHTK: torch.Tensor, axis: Axis, num_layers: int) -> None:
    """Queries, keys and values there, what was attended back."""
    for _ in range(num_layers):
        for _ in range(3):
            exchanged_BHTK = heads_for_tokens(x_BHTK, axis)
        tokens_for_heads(exchanged_BHTK, axis)


def _round_the_ring(x_2BSHK: torch.Tensor, ring: Axis, num_layers: int) -> None:
    """Keys and values, to all ranks but the one that they come from."""
    for _ in range(num_layers * (ring.size - 1)):
        pass_on(x_2BSHK, ring).finish()


def _sums(x_BTD: torch.Tensor, reductions: Reductions, number: int) -> None:
    for _ in range(number):
        reductions.sum(x_BTD)
