"""Attention by cuDNN with what torch's public function keeps to itself: the log-sum-exp that partial results merge by.

`torch.nn.functional.scaled_dot_product_attention` calls the same operator and drops its second result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_with_lse(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.attention_with_lse`; bfloat16 or float16 on CUDA only."""
    mixed_BHTK, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q_BHTK, k_BHSK, v_BHSK, bias, True)
    # cuDNN leaves a last axis of one.
    return mixed_BHTK, lse.view(q_BHTK.shape[:3])
