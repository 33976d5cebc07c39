"""What each block of keys promises to each block of queries: two passes, one over the queries and one over the keys.

    mean    = (sum of a block's queries / their number) / sqrt(K), rounded to the dtype of q
    promise = log(sum over a block's keys of exp(mean . key))

q (B, H, T, K) and k (B, H, S, K) of float32, bfloat16 or float16 and of any strides: as a rule they lie token by token.
Sums are float32, and products are not rounded, where the reference rounds them to the dtype of q.

The first pass reads q once and writes 1/128 of it. A program of the second holds some blocks of keys of one head, which
are read once, and goes over the head's mean queries, tile by tile; those of all heads stay in the L2 cache (32,640
tokens of 4,096 channels: 2 MB). No logit leaves the registers. In both passes neighbouring programs take neighbouring
heads, whose rows are neighbours in memory.

The result is (B, H, Q, N) in memory too, though a program makes only a few neighbours of N for all of Q: what reads it
looks for the largest along N, row by row, and lines half written wait in the L2 cache (8 MB in all) for their other
half.

Defined by `kernels.reference.block_promise`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import BLOCK_TOKENS

# Of a program of the first pass, which holds 128 tokens of one head: a thread loads 16 bytes 32 times. On one H200 both
# passes took 0.28 ms for 32,640 tokens of 32 heads, with four times as many warps 0.31.
MEAN_WARPS = 2
# The GPU's exponential is of two.
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


class _Tiles(NamedTuple):
    """What a program of the second pass holds: blocks of keys, and mean queries at a time; by how many warps."""

    blocks: int
    queries: int
    warps: int
    stages: int


# One warp group multiplies 64 queries by 256 keys, the most that one instruction of Hopper's takes, and reduces them
# where they lie: a thread holds 32 keys of each block of two queries. That fills its registers, spills none and leaves
# room for a second program on the multiprocessor, which multiplies while this one takes exponentials.
HALF_TILES = _Tiles(blocks=2, queries=64, warps=4, stages=2)
# Without tensor cores all operands are in registers, and more queries or fewer warps would spill.
FLOAT_TILES = _Tiles(blocks=1, queries=16, warps=8, stages=1)


@triton.jit
def _rows(
    x, first, num_tokens, sample_stride, head_stride, token_stride, channel_stride, K: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tokens from `first` on, of this program's head and sample: (TOKENS, WIDTH), zeros past the end and past K."""
    x += tl.program_id(0).to(tl.int64) * head_stride + tl.program_id(2).to(tl.int64) * sample_stride
    x += first.to(tl.int64) * token_stride
    token = tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    mask = (token < num_tokens - first) & (channel < K)
    return tl.load(x + token * token_stride + channel * channel_stride, mask=mask, other=0.0)


@triton.jit
def _block_mean_kernel(
    q, mean, num_tokens, sample_stride, head_stride, token_stride, channel_stride, root, K: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    first = block * TOKENS
    queries = _rows(
        q, first, num_tokens, sample_stride, head_stride, token_stride, channel_stride, K, TOKENS, WIDTH
    )  # fmt: skip
    total = tl.sum(queries.to(tl.float32), axis=0)
    scaled = total / tl.minimum(num_tokens - first, TOKENS) / root
    channel = tl.arange(0, WIDTH)
    head_of_all = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = (head_of_all * tl.num_programs(1) + block) * K + channel
    tl.store(mean + at, scaled.to(mean.dtype.element_ty), mask=channel < K)


@triton.jit
def _block_promise_kernel(
    mean, k, promise, Q, num_keys, N, sample_stride, head_stride, token_stride, channel_stride, K: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    first_block = tl.program_id(1) * BLOCKS
    first_key = first_block * TOKENS
    keys = _rows(
        k, first_key, num_keys, sample_stride, head_stride, token_stride, channel_stride, K, BLOCKS * TOKENS, WIDTH
    )  # fmt: skip
    is_key = (tl.arange(0, BLOCKS * TOKENS) < num_keys - first_key)[None, :]
    block = first_block + tl.arange(0, BLOCKS)[None, :]
    channel = tl.arange(0, WIDTH)[None, :]
    head_of_all = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    mean += head_of_all * Q * K
    promise += head_of_all * Q * N
    for first_query in range(0, Q, QUERIES):
        query = first_query + tl.arange(0, QUERIES)[:, None]
        means = tl.load(mean + query * K + channel, mask=(query < Q) & (channel < K), other=0.0)
        logits = tl.dot(means, tl.trans(keys), input_precision="ieee")
        logits = tl.where(is_key, logits, float("-inf"))
        # A whole block past the end makes a NaN, which is not stored.
        logits = tl.reshape(logits, (QUERIES, BLOCKS, TOKENS))
        peak = tl.max(logits, axis=2) * LOG2_E
        total = tl.sum(tl.exp2(logits * LOG2_E - peak[:, :, None]), axis=2)
        tl.store(promise + query * N + block, (peak + tl.log2(total)) * LN_2, mask=(query < Q) & (block < N))


def block_promise(q_BHTK: Tensor, k_BHSK: Tensor) -> Tensor:
    """`kernels.reference.block_promise` on a GPU."""
    num_samples, num_heads, num_tokens, channels = q_BHTK.shape
    num_keys = k_BHSK.shape[2]
    query_blocks, key_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(num_keys, BLOCK_TOKENS)
    mean_BHQK = q_BHTK.new_empty(num_samples, num_heads, query_blocks, channels)
    promise_BHQN = q_BHTK.new_empty(num_samples, num_heads, query_blocks, key_blocks, dtype=torch.float32)
    width = triton.next_power_of_2(channels)
    _block_mean_kernel[(num_heads, query_blocks, num_samples)](
        q_BHTK, mean_BHQK, num_tokens, *q_BHTK.stride(), math.sqrt(channels), K=channels, TOKENS=BLOCK_TOKENS,
        WIDTH=width, num_warps=MEAN_WARPS,
    )  # fmt: skip
    tiles = FLOAT_TILES if q_BHTK.dtype == torch.float32 else HALF_TILES
    _block_promise_kernel[(num_heads, triton.cdiv(key_blocks, tiles.blocks), num_samples)](
        mean_BHQK, k_BHSK, promise_BHQN, query_blocks, num_keys, key_blocks, *k_BHSK.stride(), K=channels,
        TOKENS=BLOCK_TOKENS, WIDTH=width, BLOCKS=tiles.blocks, QUERIES=tiles.queries, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    return promise_BHQN
