"""Attention over chosen blocks of keys on Hopper: NVIDIA's CuTe kernel of `nvidia-cudnn-frontend`.

What it computes is defined by `kernels.reference.block_sparse_attention`; who chooses the blocks is above. Importing
this needs the library and `nvidia-cutlass-dsl`; the first call of each kind of numbers and head compiles for seconds.

Shape suffixes are those of `kernels.reference`.
"""

from __future__ import annotations

from cudnn import BSA
from torch import Tensor

from kernels.reference import BLOCK_TOKENS

# The library loads its parts by name; loading this one here finds a missing `nvidia-cutlass-dsl` now, not in a clip.
_forward = BSA.block_sparse_attention_forward


def block_sparse_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, seen_BHQN: Tensor) -> Tensor:
    """See `kernels.reference.block_sparse_attention`. For bfloat16 or float16 on compute capability 9.0,
    and heads of 64, 96 or 128 channels.

    Lengths need not be multiples of 128: with blocks of 128 the kernel hides keys past the end by itself and does not
    write queries past it. Rows of q, k and v must start at multiples of 16 bytes; the kernel raises where they do not.
    """
    q_BTHK, k_BSHK, v_BSHK = (x.transpose(1, 2) for x in (q_BHTK, k_BHSK, v_BHSK))
    # Without a block size it takes 64 on Hopper, which takes a sixth longer. Its result lies as `layout` says: token by
    # token, so that heads need no copy to stand side by side again.
    found = _forward(q_BTHK, k_BSHK, v_BSHK, seen_BHQN, sparse_block_size=BLOCK_TOKENS, layout="bshd")
    return found["o_tensor"].transpose(1, 2)
