"""Attention slots for video tokens that are spread over ranks. All other slots stay as they are.

Video self-attention exchanges heads for tokens along the ulysses axis and passes keys and values on along the ring.
Audio-from-video attention, whose queries are whole on every rank, takes each rank's heads along ulysses and merges what
the ranks of the ring found. Text attention and video-from-audio have their keys whole on every rank.

Shape suffixes: B batch, H heads (of a rank, once they are exchanged), T query tokens, S key tokens, K channels of a
head; n ranks of an axis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ops import AttentionFn, AttentionWithLseFn
from pipeline.parallel.collectives import gathered, heads_for_tokens, pass_on, tokens_for_heads
from pipeline.parallel.layout import Axis, SequenceAxes
from pipeline.parallel.shards import Shards, padded

EvenAttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v of own tokens, BHTK each) -> BHTK of own tokens, every rank having as many."""


class CallInHand:
    """What slots must know of the call of the denoiser that they are part of, and cannot see from their tensors."""

    def __init__(self) -> None:
        self.shards = Shards(0, 1, 1)


class VideoSelfAttention:
    """(q, k, v of own tokens, bias) -> BHTK of own tokens; the bias is that of the own ring's chunk to all tokens.

    `whole` attends where all keys are at hand, `partial` to one chunk of the ring after the other.
    """

    def __init__(self, axes: SequenceAxes, call: CallInHand, whole: AttentionFn, partial: AttentionWithLseFn) -> None:
        self._axes = axes
        self._call = call
        self._attend_whole = whole
        self._attend_partly = partial

    def __call__(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
        shards, ring, ulysses = self._call.shards, self._axes.ring, self._axes.ulysses
        q_BHTK, k_BHSK, v_BHSK = (heads_for_tokens(x, ulysses) for x in (q_BHTK, k_BHSK, v_BHSK))
        num_real = shards.num_in_chunk(ring.index)
        q_BHTK = q_BHTK[:, :, :num_real]
        if ring.size == 1:
            mixed_BHTK = self._attend_whole(q_BHTK, k_BHSK[:, :, :num_real], v_BHSK[:, :, :num_real], bias)
        else:
            mixed_BHTK = ring_attention(q_BHTK, (k_BHSK, v_BHSK), bias, shards, ring, self._attend_partly)
        return tokens_for_heads(padded(mixed_BHTK, 2, shards.chunk_len), ulysses)


class EvenSelfAttention:
    """Somebody else's spread self-attention where it fits: parts without padding, no bias. `ours` for the rest."""

    def __init__(self, even: EvenAttentionFn, ours: VideoSelfAttention, call: CallInHand) -> None:
        self._even = even
        self._ours = ours
        self._call = call

    def __call__(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None or self._call.shards.has_padding:
            return self._ours(q_BHTK, k_BHSK, v_BHSK, bias)
        return self._even(q_BHTK, k_BHSK, v_BHSK)


class AudioFromVideoAttention:
    """(q of all audio tokens, k and v of own video tokens, no bias) -> BHTK of all audio tokens.

    `whole` attends where all keys are at hand, `partial` to the own chunk of the ring.
    """

    def __init__(self, axes: SequenceAxes, call: CallInHand, whole: AttentionFn, partial: AttentionWithLseFn) -> None:
        self._axes = axes
        self._call = call
        self._attend_whole = whole
        self._attend_partly = partial

    def __call__(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
        ring, ulysses = self._axes.ring, self._axes.ulysses
        num_real = self._call.shards.num_in_chunk(ring.index)
        k_BHSK, v_BHSK = (heads_for_tokens(x, ulysses)[:, :, :num_real] for x in (k_BHSK, v_BHSK))
        q_BHTK = q_BHTK.chunk(ulysses.size, dim=1)[ulysses.index]
        if ring.size == 1:
            mixed_BHTK = self._attend_whole(q_BHTK, k_BHSK, v_BHSK, bias)
        else:
            mixed_BHTK = _merged_along(ring, q_BHTK, k_BHSK, v_BHSK, self._attend_partly)
        return gathered(mixed_BHTK, ulysses, dim=1)


def ring_attention(
    q_BHTK: Tensor,
    keys_values: tuple[Tensor, Tensor],
    bias: Tensor | None,
    shards: Shards,
    ring: Axis,
    attention_with_lse: AttentionWithLseFn,
) -> Tensor:
    """Own queries, which stay, over the keys of all chunks, which travel; in the dtype of q.

    While a chunk is attended to, it is on its way to the next rank already. Queries are without padding; keys and
    values (B, H, chunk_len, K) are with it, because they are sent. To a query whose bias hides every key, chunks count
    alike, and not keys.
    """
    # Tokens come before heads, as they lie after an exchange, so that one copy makes both one message.
    travelling_2BSHK = torch.stack([x.transpose(1, 2) for x in keys_values])
    merged = Merged(q_BHTK)
    for hop in range(ring.size):
        source = (ring.index - hop) % ring.size
        passing = pass_on(travelling_2BSHK, ring) if hop + 1 < ring.size else None
        start, num_real = source * shards.chunk_len, shards.num_in_chunk(source)
        if num_real and q_BHTK.shape[2]:
            k_BHSK, v_BHSK = travelling_2BSHK[:, :, :num_real].transpose(2, 3).unbind()
            of_chunk = None if bias is None else bias[..., start : start + num_real]
            merged.add(*attention_with_lse(q_BHTK, k_BHSK, v_BHSK, of_chunk))
        if passing is not None:
            travelling_2BSHK = passing.finish()
    return merged.mixed_BHTK.to(q_BHTK.dtype)


class Merged:
    """Attention over the parts of the keys added so far, float32.

    With l = log(e^a + e^b), parts x_a and x_b of log-sum-exp a and b make x_a e^(a - l) + x_b e^(b - l), of
    log-sum-exp l (Ring Attention, arXiv 2310.01889; the softmax of parts is that of arXiv 1805.02867).
    """

    def __init__(self, q_BHTK: Tensor) -> None:
        self.mixed_BHTK = torch.zeros(q_BHTK.shape, dtype=torch.float32, device=q_BHTK.device)
        self.lse_BHT = torch.full(q_BHTK.shape[:3], -torch.inf, device=q_BHTK.device)

    def add(self, part_BHTK: Tensor, part_lse_BHT: Tensor) -> None:
        lse_BHT = torch.logaddexp(self.lse_BHT, part_lse_BHT)
        self.mixed_BHTK *= (self.lse_BHT - lse_BHT).exp()[..., None]
        self.mixed_BHTK.addcmul_(part_BHTK, (part_lse_BHT - lse_BHT).exp()[..., None])
        self.lse_BHT = lse_BHT


def _merged_along(
    ring: Axis, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, attention_with_lse: AttentionWithLseFn
) -> Tensor:
    """Queries that every rank of the ring has, over the keys that they have between them; in the dtype of q."""
    merged = Merged(q_BHTK)
    if k_BHSK.shape[2]:
        merged.add(*attention_with_lse(q_BHTK, k_BHSK, v_BHSK, None))
    parts_nBHTC = gathered(torch.cat((merged.mixed_BHTK, merged.lse_BHT[..., None]), dim=-1)[None], ring, dim=0)
    weight_nBHT1 = parts_nBHTC[..., -1:].softmax(dim=0)
    return (parts_nBHTC[..., :-1] * weight_nBHT1).sum(dim=0).to(q_BHTK.dtype)
