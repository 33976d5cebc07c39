"""Which blocks of keys each block of queries sees: those that promise most, in ascending order, in one pass.

    t    = the num_seen-th largest of a row's promises, those of blocks that are always seen taken as infinite
    seen = all above t, then the first of those equal to t, until there are num_seen

promise (B, H, Q, N) float32, contiguous, no NaN; always (Q, N) bool, contiguous. A row lies in registers as integers
of the same order and finds t bit by bit, from the highest down: 32 counts of how many are as large. A running count of
those seen is then each one's place. A library's search for the largest and its sort of what that found go over
the rows several times: on one H200, 8,160 rows of 255 took them 0.24 ms, and take this 0.03.

Defined by `kernels.reference.chosen_blocks`, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import require_contiguous

# Of a row's numbers one warp holds so many, and more warps share a longer row.
_NUMBERS_A_WARP = 1024


@triton.jit
def _chosen_blocks_kernel(promise, always, seen, Q, N, num_seen, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    is_block = block < N
    value = tl.load(promise + row * N + block, mask=is_block, other=0.0)
    is_always = tl.load(always + (row % Q) * N + block, mask=is_block, other=0)
    value = tl.where(is_always != 0, float("inf"), value)
    # Zeros are equal, whatever their sign.
    value = tl.where(value == 0.0, 0.0, value)
    # Bits of floats are ordered as integers, if those of negative ones are turned round; what is no block is least.
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(is_block, bits.to(tl.int64) + 2147483648, -1)
    threshold = tl.zeros((), tl.int64)
    for step in tl.static_range(32):
        higher = threshold + (1 << (31 - step))
        enough = tl.sum((order >= higher).to(tl.int32), axis=0) >= num_seen
        threshold = tl.where(enough, higher, threshold)
    above = order > threshold
    equal = (order == threshold).to(tl.int32)
    room = num_seen - tl.sum(above.to(tl.int32), axis=0)
    is_seen = above | ((equal != 0) & (tl.cumsum(equal, axis=0) <= room))
    place = tl.cumsum(is_seen.to(tl.int32), axis=0) - 1
    tl.store(seen + row * num_seen + place, block, mask=is_seen)


def chosen_blocks(promise_BHQN: Tensor, always_QN: Tensor, num_seen: int) -> Tensor:
    """`kernels.reference.chosen_blocks` on a GPU. ValueError if a layout is off or there are not so many blocks."""
    require_contiguous("promise_BHQN", promise_BHQN)
    require_contiguous("always_QN", always_QN)
    num_queries, num_blocks = promise_BHQN.shape[2:]
    if always_QN.shape != (num_queries, num_blocks):
        raise ValueError(f"always_QN must be {(num_queries, num_blocks)}, got {tuple(always_QN.shape)}")
    if not 1 <= num_seen <= num_blocks:
        raise ValueError(f"num_seen must be from 1 to {num_blocks}, got {num_seen}")
    seen_BHQN = torch.empty(*promise_BHQN.shape[:3], num_seen, dtype=torch.int32, device=promise_BHQN.device)
    width = triton.next_power_of_2(num_blocks)
    _chosen_blocks_kernel[(seen_BHQN.numel() // num_seen,)](
        promise_BHQN, always_QN, seen_BHQN, num_queries, num_blocks, num_seen, BLOCK=width,
        num_warps=max(1, min(8, width // _NUMBERS_A_WARP)),
    )  # fmt: skip
    return seen_BHQN
