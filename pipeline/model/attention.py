"""Projections around the attention slot: one module for self-, text and audio-video attention.

`attend` is the slot, and the only attribute that anything outside may replace (to spread attention over devices).

Shape suffixes: B batch, T query tokens, S key tokens, D channels, H heads, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from pipeline.model.rope import RotaryTable

# Which samples of a batch go without something: none (False), all (True), or those marked in a bool (B,).
Skipped = bool | Tensor


class HeadNorm(nn.Module):
    """Holds the weight of a query or key norm. It spans all heads together, (H * K,); see `qk_norm_rope`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Multi-head attention with normed, optionally rotated queries and keys."""

    def __init__(
        self, *, query_dim: int, context_dim: int, num_heads: int, head_dim: int, norm_eps: float, ops: OpSet
    ) -> None:
        super().__init__()
        inner_dim = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_eps = norm_eps
        self.to_q = nn.Linear(query_dim, inner_dim)
        self.to_k = nn.Linear(context_dim, inner_dim)
        self.to_v = nn.Linear(context_dim, inner_dim)
        self.to_out = nn.Linear(inner_dim, query_dim)
        self.q_norm = HeadNorm(inner_dim)
        self.k_norm = HeadNorm(inner_dim)
        self.attend = ops.attention
        self.qk_norm_rope = ops.qk_norm_rope

    def forward(
        self,
        x_BTD: Tensor,
        context_BSD: Tensor,
        *,
        bias: Tensor | None = None,
        rotary: RotaryTable | None = None,
        key_rotary: RotaryTable | None = None,
        skipped: Skipped = False,
    ) -> Tensor:
        """What each token of x takes from the context, (B, T, D of x).

        `bias` is additive and broadcasts to (B, H, T, S). Skipped samples pass the value projection through in place of
        attention (so S must be T), and still go through the output projection.
        """
        v_BSD = self.to_v(context_BSD)
        if skipped is True:
            return self.to_out(v_BSD)
        q_BHTK = self.qk_norm_rope(self.to_q(x_BTD), self.q_norm.weight, rotary, self.num_heads, self.norm_eps)
        k_BHSK = self.qk_norm_rope(
            self.to_k(context_BSD), self.k_norm.weight, key_rotary, self.num_heads, self.norm_eps
        )
        v_BHSK = v_BSD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mixed_BTD = self.attend(q_BHTK, k_BHSK, v_BHSK, bias).transpose(1, 2).flatten(2)
        if isinstance(skipped, Tensor):
            mixed_BTD = torch.where(skipped[:, None, None], v_BSD, mixed_BTD)
        return self.to_out(mixed_BTD)
