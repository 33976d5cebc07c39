"""Projections around the attention slot: one module for self-, text and audio-video attention.

`attend` is the slot, and the only attribute that anything outside may replace (to spread attention over devices).

Shape suffixes: B batch, T query tokens, S key tokens, D channels, H heads, K channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from kernels.rows import ScaledRows
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.rope import RotaryTable

# Which samples of a batch go without something: none (False), all (True), or those marked in a bool (B,).
Skipped = bool | Tensor


class KeysValues(NamedTuple):
    """What queries meet, ready for the slot: (B, H, S, K) each."""

    k_BHSK: Tensor
    v_BHSK: Tensor


class HeadNorm(nn.Module):
    """Holds the weight of a query or key norm. It spans all heads together, (H * K,); see `qk_norm_rope`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Multi-head attention with normed, optionally rotated queries and keys."""

    def __init__(
        self, heads_of: StreamHparams, query_dim: int, context_dim: int, hparams: DenoiserHparams, ops: OpSet
    ) -> None:
        super().__init__()
        inner_dim = heads_of.width
        self.num_heads = heads_of.num_heads
        self.norm_eps = hparams.qk_norm_eps
        self.to_q = nn.Linear(query_dim, inner_dim)
        self.to_k = nn.Linear(context_dim, inner_dim)
        self.to_v = nn.Linear(context_dim, inner_dim)
        self.to_out = nn.Linear(inner_dim, query_dim)
        self.q_norm = HeadNorm(inner_dim)
        self.k_norm = HeadNorm(inner_dim)
        self.to_gate_logits = nn.Linear(query_dim, self.num_heads) if hparams.gated_attention else None
        # If all projections are float8 layers, whoever makes them so says it here.
        self.in_float8 = False
        self.attend = ops.attention
        self.quantise_rows = ops.quantise_rows
        self.qk_norm_rope = ops.qk_norm_rope_interleaved if hparams.rotary.interleaved else ops.qk_norm_rope
        self.gate_heads = ops.gate_heads

    @property
    def reads_rows(self) -> bool:
        """If inputs may come as float8 rows, because nothing reads them but float8 layers."""
        return self.in_float8 and self.to_gate_logits is None

    def forward(
        self,
        x: Tensor | ScaledRows,
        context: Tensor | ScaledRows | KeysValues,
        *,
        bias: Tensor | None = None,
        rotary: RotaryTable | None = None,
        key_rotary: RotaryTable | None = None,
        values_only: Skipped = False,
        input_only: Skipped = False,
    ) -> Tensor:
        """What each token of x (B, T, D) takes from the context (B, S, D), (B, T, D of x).

        `bias` is additive and broadcasts to (B, H, T, S). In place of attention, samples in `values_only` pass their
        value projection on (so S must be T) and those in `input_only` x itself (so its width must be the heads', and it
        must be a tensor); both still go through the gate and the output projection.
        """
        if input_only is True:
            return self._project_out(cast(Tensor, x), x)
        rows = self._rows(x)
        given = rows if context is x else context
        if values_only is True:
            return self._project_out(self.to_v(given), x)
        k_BHSK, v_BHSK = given if isinstance(given, KeysValues) else self.keys_values(given, key_rotary)
        q_BHTK = self.qk_norm_rope(self.to_q(rows), self.q_norm.weight, rotary, self.num_heads, self.norm_eps)
        mixed_BTD = self.attend(q_BHTK, k_BHSK, v_BHSK, bias).transpose(1, 2).flatten(2)
        if values_only is not False:
            mixed_BTD = where_skipped(values_only, v_BHSK.transpose(1, 2).flatten(2), mixed_BTD)
        if input_only is not False:
            mixed_BTD = where_skipped(input_only, cast(Tensor, x), mixed_BTD)
        return self._project_out(mixed_BTD, x)

    def keys_values(self, context: Tensor | ScaledRows, rotary: RotaryTable | None = None) -> KeysValues:
        """Of a context (B, S, D)."""
        rows = self._rows(context)
        k_BHSK = self.qk_norm_rope(self.to_k(rows), self.k_norm.weight, rotary, self.num_heads, self.norm_eps)
        return KeysValues(k_BHSK, self.to_v(rows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))

    def _rows(self, x: Tensor | ScaledRows) -> Tensor | ScaledRows:
        """Quantised here, once, what several float8 layers are to read."""
        if self.in_float8 and isinstance(x, Tensor):
            return ScaledRows(*self.quantise_rows(x), x.dtype)
        return x

    def _project_out(self, mixed_BTD: Tensor, x: Tensor | ScaledRows) -> Tensor:
        if self.to_gate_logits is not None:
            mixed_BTD = self.gate_heads(mixed_BTD, self.to_gate_logits(x))
        return self.to_out(mixed_BTD)


def where_skipped(skipped: Skipped, instead_BTD: Tensor, computed_BTD: Tensor) -> Tensor:
    """`instead` for skipped samples, `computed` for the others."""
    if isinstance(skipped, Tensor):
        return torch.where(skipped[:, None, None], instead_BTD, computed_BTD)
    return instead_BTD if skipped else computed_BTD
