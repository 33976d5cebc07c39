"""Attention on Hopper by FlashAttention-4: over all keys where it is faster than cuDNN, and over chosen blocks of them.

Who attends to which shape is a rule, made from measurements (`jobs.bench kernel`; tests/bench/results/attention.jsonl)
and the same on every machine that has the library, because two libraries round differently and a clip must not depend
on who timed what. Each shape's choice is logged once. Importing this needs the package `flash-attn-4`; the first call
of each kind of numbers, head and pattern compiles for ten seconds, once a machine.

Defined by the functions of the same names in `kernels.reference`, whose shape suffixes are used.
"""

from __future__ import annotations

import logging
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kernels.reference import BLOCK_TOKENS

# The library keeps compiled kernels on disk only if it is told so by its environment before it is imported. Left to
# itself it would ask for the user's name, which a container may not have.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"flash-{os.getuid()}"))

from flash_attn.cute import flash_attn_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

log = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_CHANNELS = (64, 128)
# On one H200 it takes 0.93 of cuDNN's time at 32,640 tokens, 0.85 at 8,160 and 0.96 at 2,560; at 640, and to 1,024 keys
# of text from however many queries, it is no faster, and its calls cost the host three times as much.
_MIN_QUERIES = _MIN_KEYS = 2048


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.reference.attention` on a GPU of compute capability 9.0."""
    if bias is not None or q_BHTK.dtype not in _DTYPES:
        return functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias)
    if not _is_for_flash(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.shape[3]):
        return functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK)
    mixed_BTHK, *_ = flash_attn_func(q_BHTK.transpose(1, 2), k_BHSK.transpose(1, 2), v_BHSK.transpose(1, 2))
    return mixed_BTHK.transpose(1, 2)


def block_sparse_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, seen_BHQN: Tensor) -> Tensor:
    """`kernels.reference.block_sparse_attention` for bfloat16 or float16 on a GPU of compute capability 9.0, and heads
    of 64 or 128 channels. Rows of q, k and v must start at multiples of 16 bytes; the library raises where they do not.
    """
    # The library hides keys past the end in the block that it takes first, the last of a list: there the short block
    # is, if it is seen, because lists ascend.
    num_BHQ = torch.full(seen_BHQN.shape[:3], seen_BHQN.shape[3], dtype=torch.int32, device=seen_BHQN.device)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(num_BHQ),
        mask_block_idx=seen_BHQN,
        full_block_cnt=num_BHQ,
        full_block_idx=seen_BHQN,
        block_size=(BLOCK_TOKENS, BLOCK_TOKENS),
    )
    q_BTHK, k_BSHK, v_BSHK = (x.transpose(1, 2) for x in (q_BHTK, k_BHSK, v_BHSK))
    mixed_BTHK, *_ = flash_attn_func(q_BTHK, k_BSHK, v_BSHK, block_sparse_tensors=blocks)
    return mixed_BTHK.transpose(1, 2)


@cache
def _is_for_flash(num_queries: int, num_keys: int, head_channels: int) -> bool:
    chosen = head_channels in _HEAD_CHANNELS and num_queries >= _MIN_QUERIES and num_keys >= _MIN_KEYS
    facts = {"queries": num_queries, "keys": num_keys, "head_channels": head_channels}
    log.info("attention", extra={"facts": facts | {"library": "flash-attn-4" if chosen else "cudnn"}})
    return chosen
