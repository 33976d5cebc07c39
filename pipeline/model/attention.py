"""Projections around the attention slot: one module for self-, text and audio-video attention.

`attend` is the slot, which anything outside may replace (to spread attention over devices). Where devices share the
heads of a module among them, `share_heads` says so to each; its weights then hold the channels of its own heads.

Shape suffixes: B batch, T query tokens, S key tokens, D channels, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels.ops import OpSet, QkNormRopeBothFn, QkNormRopeFn
from kernels.rows import ScaledRows
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.rope import RotaryTable
from pipeline.model.share import Share

# Which samples of a batch go without something: none (False), all (True), or those marked in a bool (B,).
Skipped = bool | Tensor


class KeysValues(NamedTuple):
    """What queries meet, ready for the slot: (B, H, S, K) each."""

    k_BHSK: Tensor
    v_BHSK: Tensor


class Projected(NamedTuple):
    """Queries or keys before their norm, (B, T, H * K), its weight, (H * K,), and their rotations."""

    x_BTD: Tensor
    weight_D: Tensor
    rotary: RotaryTable | None


NormHeadsFn = Callable[[Sequence[Projected], int, float], list[Tensor]]
"""(projections of one attention, number of heads, eps) -> BHTK of each"""


def on_one_device(norm: QkNormRopeFn, norm_both: QkNormRopeBothFn) -> NormHeadsFn:
    """Queries and keys together where their rotations are the same table, else each projection by itself."""

    def norm_heads(projections: Sequence[Projected], num_heads: int, eps: float) -> list[Tensor]:
        first, *others = projections
        if len(others) == 1 and first.rotary is not None and others[0].rotary is first.rotary:
            (keys,) = others
            return [*norm_both(first.x_BTD, keys.x_BTD, first.weight_D, keys.weight_D, first.rotary, num_heads, eps)]
        return [norm(given.x_BTD, given.weight_D, given.rotary, num_heads, eps) for given in projections]

    return norm_heads


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
        # Of a tensor as wide as all heads, those of the heads that are computed here.
        self.channels = slice(0, inner_dim)
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
        if hparams.rotary.interleaved:
            self.norm_heads = on_one_device(ops.qk_norm_rope_interleaved, ops.qk_norm_rope_both_interleaved)
        else:
            self.norm_heads = on_one_device(ops.qk_norm_rope, ops.qk_norm_rope_both)
        self.gate_heads = ops.gate_heads

    def share_heads(self, share: Share, norm_heads: NormHeadsFn) -> None:
        """Compute a share of the heads only, and norm queries and keys by an operation that knows of the others.

        What `to_out` makes of these heads is then a part of a sum.
        """
        self.channels = share.of(self.channels.stop)
        self.num_heads //= share.number
        self.norm_heads = norm_heads

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
            return self._project_out(cast(Tensor, x)[..., self.channels], x)
        rows = self._rows(x)
        given = rows if context is x else context
        if values_only is True:
            return self._project_out(self.to_v(given), x)
        if isinstance(given, KeysValues):
            k_BHSK, v_BHSK = given
            (q_BHTK,) = self._normed(self._queries(rows, rotary))
        else:
            given = self._rows(given)
            q_BHTK, k_BHSK = self._normed(self._queries(rows, rotary), self._keys(given, key_rotary))
            v_BHSK = self._values(given)
        mixed_BTD = self.attend(q_BHTK, k_BHSK, v_BHSK, bias).transpose(1, 2).flatten(2)
        if values_only is not False:
            mixed_BTD = where_skipped(values_only, v_BHSK.transpose(1, 2).flatten(2), mixed_BTD)
        if input_only is not False:
            mixed_BTD = where_skipped(input_only, cast(Tensor, x)[..., self.channels], mixed_BTD)
        return self._project_out(mixed_BTD, x)

    def keys_values(self, context: Tensor | ScaledRows, rotary: RotaryTable | None = None) -> KeysValues:
        """Of a context (B, S, D)."""
        rows = self._rows(context)
        (k_BHSK,) = self._normed(self._keys(rows, rotary))
        return KeysValues(k_BHSK, self._values(rows))

    def _normed(self, *projections: Projected) -> list[Tensor]:
        return self.norm_heads(projections, self.num_heads, self.norm_eps)

    def _queries(self, rows: Tensor | ScaledRows, rotary: RotaryTable | None) -> Projected:
        return Projected(self.to_q(rows), self.q_norm.weight, rotary)

    def _keys(self, rows: Tensor | ScaledRows, rotary: RotaryTable | None) -> Projected:
        return Projected(self.to_k(rows), self.k_norm.weight, rotary)

    def _values(self, rows: Tensor | ScaledRows) -> Tensor:
        return self.to_v(rows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

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
