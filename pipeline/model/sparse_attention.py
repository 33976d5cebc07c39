"""Video self-attention over some blocks of keys: which blocks, and the slot that attends to those.

A block of 128 queries sees the keys that are near it, those of the first frame, and those that promise most of the
softmax. How the tokens are ordered is in `token_order.py`; in which steps it is done is the engine's business.

Shape suffixes: B batch, T query tokens, S key tokens, H heads, K channels of a head, Q blocks of queries, N blocks of
keys, A position axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kernels.ops import AttentionFn, OpSet, block_means
from pipeline.model.block import AudioVideoBlock
from pipeline.model.denoiser import AudioVideoDenoiser

NUM_NEAREST = 5
"""Blocks that a block always sees because they are near it, itself among them."""


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """What of the choice does not depend on the content: how many blocks each sees, and which in any case.

    `always_QN` is bool. All blocks of queries see the same number of blocks, which is what the GPU's kernel is fast at.
    """

    num_tokens: int
    num_seen: int
    always_QN: Tensor

    @property
    def seen_part(self) -> float:
        """Of all blocks, those that each block sees."""
        return self.num_seen / len(self.always_QN)


def block_pattern(places_TA: Tensor, is_first_T: Tensor, density: float) -> BlockPattern:
    """The pattern of tokens at `places_TA` (in tiles), of which those of the first frame are marked in `is_first_T`.

    Each block sees `density` of them, rounded up; in short clips more, because what is always seen may be half of it
    at most: the rest is for the content.
    """
    places_QA = block_means(places_TA[None, None])[0, 0]
    num_blocks = len(places_QA)
    nearest_QN = torch.cdist(places_QA, places_QA).topk(min(NUM_NEAREST, num_blocks), largest=False).indices
    holds_first_N = block_means(is_first_T.float()[None, None, :, None])[0, 0, :, 0] > 0
    always_QN = holds_first_N.repeat(num_blocks, 1).scatter(1, nearest_QN, True)
    most = int(always_QN.sum(dim=1).max())
    num_seen = min(num_blocks, max(math.ceil(density * num_blocks), 2 * most))
    return BlockPattern(len(places_TA), num_seen, always_QN)


def seen_blocks(q_BHTK: Tensor, k_BHSK: Tensor, pattern: BlockPattern, ops: OpSet) -> Tensor:
    """The blocks of keys that each block of queries sees, int32 (B, H, Q, N of `num_seen`), in ascending order.

    What a block of keys promises is its share of the softmax of a block's mean query. Queries are pooled and keys are
    not: a few keys that all queries look at (sinks, outliers) are 1/128 of the mean of their block, and attention
    without them is another attention. tests/engine/test_block_choice.py has the numbers. It costs 1/128 of the dense
    product of queries and keys.
    """
    return ops.chosen_blocks(ops.block_promise(q_BHTK, k_BHSK), pattern.always_QN, pattern.num_seen)


class PatternInForce:
    """What the sparse slots of one denoiser follow at the moment: a pattern, or none, and then they are dense.

    Whoever calls the denoiser owns it and sets it for each call.
    """

    def __init__(self) -> None:
        self.pattern: BlockPattern | None = None

    @contextmanager
    def during(self, pattern: BlockPattern | None) -> Iterator[None]:
        """`pattern` holds inside."""
        self.pattern = pattern
        try:
            yield
        finally:
            self.pattern = None


class SparseAttention:
    """An attention slot: over blocks where a pattern is in force that fits, else dense.

    It fits if it is for as many tokens and nothing is hidden or weighed by a bias.
    """

    def __init__(self, dense: AttentionFn, ops: OpSet, in_force: PatternInForce) -> None:
        self._dense = dense
        self._ops = ops
        self._in_force = in_force

    def __call__(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
        pattern = self._in_force.pattern
        if pattern is None or bias is not None or k_BHSK.shape[2] != pattern.num_tokens:
            return self._dense(q_BHTK, k_BHSK, v_BHSK, bias)
        seen_BHQN = seen_blocks(q_BHTK, k_BHSK, pattern, self._ops)
        return self._ops.block_sparse_attention(q_BHTK, k_BHSK, v_BHSK, seen_BHQN)


def use_sparse_attention(denoiser: AudioVideoDenoiser, layers: Iterable[int], ops: OpSet) -> PatternInForce:
    """Make the video's self-attention of these layers sparse, and hand out what says when."""
    in_force = PatternInForce()
    for layer in layers:
        attention = cast(AudioVideoBlock, denoiser.blocks[layer]).video.self_attention
        attention.attend = SparseAttention(attention.attend, ops, in_force)
    return in_force
