"""Dense attention on Hopper by the fastest of two libraries for each shape: FlashAttention-4 or cuDNN.

Which one is a rule, made from measurements (`jobs.bench kernel`; tests/bench/results/attention.jsonl has the rows) and
the same on every machine, because two libraries round differently and a clip must not depend on who timed what. Each
shape's choice is logged once. Importing this needs the package `flash-attn-4`; its first call of each kind of head
compiles for seconds, once a machine.

Defined by `kernels.reference.attention`, whose shape suffixes are used.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

# The library keeps compiled kernels on disk only if it is told so by its environment before it is imported.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")

from flash_attn.cute import flash_attn_func

log = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_CHANNELS = (64, 128)
# Below these, cuDNN is as fast or faster, and its calls cost the host less.
_MIN_QUERIES, _MIN_KEYS = 2048, 512


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.reference.attention` on a GPU of compute capability 9.0."""
    if bias is not None or q_BHTK.dtype not in _DTYPES:
        return functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias)
    if not _is_for_flash(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.shape[3]):
        return functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK)
    mixed_BTHK, *_ = flash_attn_func(q_BHTK.transpose(1, 2), k_BHSK.transpose(1, 2), v_BHSK.transpose(1, 2))
    return mixed_BTHK.transpose(1, 2)


@cache
def _is_for_flash(num_queries: int, num_keys: int, head_channels: int) -> bool:
    chosen = head_channels in _HEAD_CHANNELS and num_queries >= _MIN_QUERIES and num_keys >= _MIN_KEYS
    facts = {"queries": num_queries, "keys": num_keys, "head_channels": head_channels}
    log.info("attention", extra={"facts": facts | {"library": "flash-attn-4" if chosen else "cudnn"}})
    return chosen
