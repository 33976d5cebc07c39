"""Tensor parallelism: each rank of a group holds and computes some heads, and some of the wide side of feed-forwards.

Cut while loading, by the table in `tensor_table.py`, so that a full copy never exists. Tokens are whole on every rank,
and all ranks call the denoiser alike with the same inputs. What they must agree on is reduced over the group:

- sums, in the dtype of the stream, after the layers that are cut by rows;
- the mean square of queries and keys (float32), whose norm runs over all heads: one reduction for both;
- in float8 layers that are cut by rows, the largest number of each row, of weights and activations (float32). A rank's
  own would do, and save a small reduction, but would round to other float8 numbers than one GPU does: results would
  differ by what float8 costs instead of by what a sum's order does.

Groups are all that is known of ranks; whatever else is parallel goes around this.

Shape suffixes: B batch, T tokens, D channels held here, M rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_rank, get_world_size
from torch.nn import functional

from kernels.ops import GeluQuantisedFn, OpSet, QkScaleRopeFn, QuantiseRowsFn, SumOfSquaresFn
from kernels.rows import ScaledRows
from pipeline.model.attention import Attention, NormHeadsFn, Projected
from pipeline.model.block import FeedForward
from pipeline.model.denoiser import AudioVideoDenoiser, StreamEnds
from pipeline.model.fp8 import Fp8Linear
from pipeline.model.share import Region, Share
from pipeline.parallel import tensor_table
from pipeline.parallel.tensor_table import Split, is_audio_work, require_degree, split_of


class TensorParallel:
    """A `pipeline.model.checkpoint.Sharding` over the ranks of a group, each with the share of its place in the group.

    `audio_group` has the same ranks in the same order. On CUDA the audio stream's work is queued beside the video's,
    while all that goes through one group goes one after the other, so in one group either would wait for the other.

    Loading, changing adapters and calling are collective: every rank must do each of them, in the same order.
    """

    def __init__(self, group: ProcessGroup, audio_group: ProcessGroup) -> None:
        self._share = Share(get_rank(group), get_world_size(group))
        self._video = Reductions(group)
        self._audio = Reductions(audio_group)

    def region(self, place: str, shape: Sequence[int]) -> Region:
        """See `Sharding`."""
        return tensor_table.region(place, shape, self._share)

    def fit(self, denoiser: AudioVideoDenoiser, ops: OpSet) -> None:
        """See `Sharding`."""
        require_degree(denoiser.hparams, self._share.number)
        interleaved = denoiser.hparams.rotary.interleaved
        scale_rope = ops.qk_scale_rope_interleaved if interleaved else ops.qk_scale_rope
        for name, module in list(denoiser.named_modules()):
            reductions = self._audio if is_audio_work(name) else self._video
            if isinstance(module, StreamEnds):
                module.share = self._share
            elif isinstance(module, Attention):
                module.share_heads(self._share, norm_heads_over(reductions, ops.sum_of_squares, scale_rope))
            elif isinstance(module, FeedForward):
                module.gelu_quantised = gelu_quantised_over(reductions, ops)
            elif split_of(name) is Split.ROW:
                denoiser.set_submodule(name, self._part_of_sum(module, ops, reductions))

    def _part_of_sum(self, layer: nn.Module, ops: OpSet, reductions: Reductions) -> nn.Module:
        with_bias = self._share.index == 0
        if isinstance(layer, Fp8Linear):
            ops = replace(ops, quantise_rows=quantise_rows_over(reductions, ops))
            return Fp8PartOfSum(layer, ops, reductions, with_bias=with_bias)
        assert isinstance(layer, nn.Linear), "only linear layers are cut by rows"
        return PartOfSum(layer, reductions, with_bias=with_bias)


class Reductions:
    """What the ranks of a group find together. Both write to the contiguous tensor that they are given."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def sum(self, x: Tensor) -> Tensor:
        all_reduce(x, group=self._group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        all_reduce(x, ReduceOp.MAX, group=self._group)
        return x

    @property
    def num_ranks(self) -> int:
        return get_world_size(self._group)


def norm_heads_over(reductions: Reductions, sum_of_squares: SumOfSquaresFn, scale_rope: QkScaleRopeFn) -> NormHeadsFn:
    """Queries and keys normed by the mean square of all ranks' channels, found for both at once."""

    def norm_heads(projections: Sequence[Projected], num_heads: int, eps: float) -> list[Tensor]:
        sums = [sum_of_squares(given.x_BTD) for given in projections]
        totals = reductions.sum(torch.cat([sum_BT1.flatten() for sum_BT1 in sums]))
        normed = []
        for given, sum_BT1, total in zip(projections, sums, totals.split([each.numel() for each in sums]), strict=True):
            num_channels = given.weight_D.numel() * reductions.num_ranks
            inverse_BT1 = torch.rsqrt(total.view_as(sum_BT1) / num_channels + eps)
            normed.append(scale_rope(given.x_BTD, inverse_BT1, given.weight_D, given.rotary, num_heads))
        return normed

    return norm_heads


def quantise_rows_over(reductions: Reductions, ops: OpSet) -> QuantiseRowsFn:
    """Rows of which each rank has a part, all parts by the scale of the whole row."""

    def quantise_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
        return ops.quantise_rows_to(x_MD, reductions.largest(ops.row_peaks(x_MD)))

    return quantise_rows


def gelu_quantised_over(reductions: Reductions, ops: OpSet) -> GeluQuantisedFn:
    """As `quantise_rows_over`, after the GELU."""
    quantise_rows = quantise_rows_over(reductions, ops)

    def gelu_quantised(x_BTD: Tensor) -> ScaledRows:
        return ScaledRows(*quantise_rows(ops.gelu_tanh(x_BTD)), x_BTD.dtype)

    return gelu_quantised


class PartOfSum(nn.Linear):
    """A linear layer that holds some of its inputs' columns, and adds up over the ranks what comes of them.

    One rank adds the bias, before the sum: there it costs no pass of its own.
    """

    def __init__(self, like: nn.Linear, reductions: Reductions, *, with_bias: bool) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None, device="meta")
        self._reductions = reductions
        self._with_bias = with_bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, N), the same on all ranks."""
        return self._reductions.sum(functional.linear(x, self.weight, self.bias if self._with_bias else None))


class Fp8PartOfSum(Fp8Linear):
    """`PartOfSum` with a float8 weight. Operations must find the scales of rows over all ranks."""

    def __init__(self, like: Fp8Linear, ops: OpSet, reductions: Reductions, *, with_bias: bool) -> None:
        super().__init__(like, ops)
        self._reductions = reductions
        self._with_bias = with_bias

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        """(B, T, D) to (B, T, N), the same on all ranks."""
        return self._reductions.sum(self.product(x, self.bias if self._with_bias else None))
