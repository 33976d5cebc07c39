"""A denoiser over several ranks, each with a part of the video's tokens: slice, run, gather.

It has the signature of the denoiser that it wraps, and every rank is given, and gets, the whole streams. Layers that
work token by token run as they are on a rank's part; attention that looks across parts has its slot replaced. Audio and
text are few tokens and stay whole on each rank, which computes them like all others.

Shape suffixes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from kernels.ops import AttentionWithLseFn
from pipeline.model.block import AudioVideoBlock
from pipeline.model.denoiser import AudioVideoDenoiser, OthersFn
from pipeline.model.hparams import DenoiserHparams
from pipeline.model.streams import Conditioning, DistinctTimesteps, Perturbation, TokenStream, attention_bias
from pipeline.parallel.attention import (
    AudioFromVideoAttention,
    CallInHand,
    EvenAttentionFn,
    EvenSelfAttention,
    VideoSelfAttention,
)
from pipeline.parallel.collectives import gathered
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.shards import Shards, part_of


class SequenceParallelDenoiser:
    """`AudioVideoDenoiser` over the ranks of `groups.tokens`; every rank makes the same calls in the same order.

    Takes the denoiser over: its attention slots are replaced, so it is of no use alone any more. Results are those of
    one rank up to rounding, because sums are taken in another order. Not thread-safe.

    `partial` is for chunks of a ring. `even`, if given, exchanges the video's tokens in our place where it can.
    """

    def __init__(
        self,
        denoiser: AudioVideoDenoiser,
        groups: RankGroups,
        partial: AttentionWithLseFn,
        even: EvenAttentionFn | None = None,
    ) -> None:
        self._denoiser = denoiser
        self._groups = groups
        self._call = CallInHand()
        for block in cast("list[AudioVideoBlock]", list(denoiser.blocks)):
            slot = block.video.self_attention
            ours = VideoSelfAttention(groups.sequence, self._call, slot.attend, partial)
            slot.attend = ours if even is None else EvenSelfAttention(even, ours, self._call)
            if block.exchange is not None:
                slot = block.exchange.audio_from_video
                slot.attend = AudioFromVideoAttention(groups.audio, self._call, slot.attend, partial)

    @property
    def hparams(self) -> DenoiserHparams:
        return self._denoiser.hparams

    def overlap_audio(self, stream: torch.cuda.Stream | None) -> None:
        """See `AudioVideoDenoiser.overlap_audio`."""
        self._denoiser.overlap_audio(stream)

    def prepare(self, video: TokenStream | None, audio: TokenStream | None) -> Conditioning:
        """See `AudioVideoDenoiser.prepare`; what it gives is for this rank's part."""
        if video is None:
            return self._denoiser.prepare(video, audio)
        shards = self._shards(video)
        prepared = self._denoiser.prepare(self._part(video, shards), audio)
        assert prepared.video is not None, "the part of a stream is a stream"
        return replace(prepared, video=replace(prepared.video, self_bias=self._self_bias(video, shards)))

    def __call__(
        self,
        video: TokenStream | None,
        audio: TokenStream | None,
        conditioning: Conditioning | None = None,
        perturbations: Sequence[Perturbation] | None = None,
        others: OthersFn | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `AudioVideoDenoiser.forward`; velocities are those of whole streams, on every rank.

        `others` is told of this rank's part, and must decide alike on every rank.
        """
        if conditioning is None:
            conditioning = self.prepare(video, audio)
        if video is None:
            return self._denoiser(video, audio, conditioning, perturbations, others)
        shards = self._call.shards = self._shards(video)
        part_BTC, audio_BTC = self._denoiser(self._part(video, shards), audio, conditioning, perturbations, others)
        return gathered(part_BTC, self._groups.tokens, dim=1)[:, : shards.num_tokens], audio_BTC

    def _shards(self, video: TokenStream) -> Shards:
        axes = self._groups.sequence
        return Shards(video.tokens_BTC.shape[1], axes.ring.size, axes.ulysses.size)

    def _part(self, video: TokenStream, shards: Shards) -> TokenStream:
        """This rank's tokens and what is said of each; what they may see of each other is `_self_bias`."""

        def part(x: Tensor, dim: int) -> Tensor:
            return part_of(x, dim, self._groups.tokens.index, shards.part_len)

        timesteps = video.timesteps
        if timesteps.index_BT is not None:
            timesteps = DistinctTimesteps(timesteps.values_BK, part(timesteps.index_BT, 1))
        marks_BT = video.keyframes_mask_BT
        return replace(
            video,
            tokens_BTC=part(video.tokens_BTC, 1),
            timesteps=timesteps,
            positions_BAT2=part(video.positions_BAT2, 2),
            attention_mask_BTT=None,
            keyframes_mask_BT=None if marks_BT is None else part(marks_BT, 1),
        )

    def _self_bias(self, video: TokenStream, shards: Shards) -> Tensor | None:
        """From the queries that this rank has after the exchange, its ring's chunk, to all keys."""
        mask_BTT = video.attention_mask_BTT
        if mask_BTT is None:
            return None
        ring = self._groups.sequence.ring.index
        start = ring * shards.chunk_len
        rows_BTT = mask_BTT[:, start : start + shards.num_in_chunk(ring)]
        return attention_bias(rows_BTT, self._denoiser.video.embed.weight.dtype)
