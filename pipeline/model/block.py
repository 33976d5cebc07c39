"""One audio-video block: each stream attends to itself and its text, the two take from each other, each is transformed.

Either stream may be absent. Norms, gates and attention are operations handed in.

Shape suffixes: B batch, T tokens of a stream, S text tokens, D channels of the stream, K distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from kernels.rows import Modulation, ScaledRows
from pipeline.model.attention import Attention, KeysValues, Skipped, where_skipped
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.lane import INLINE, Lane
from pipeline.model.modulation import ExchangeModulation
from pipeline.model.state import Branch, StreamState, normed, settled
from pipeline.model.streams import Perturbation, SkipStrategy

FEED_FORWARD_FACTOR = 4


@dataclass(frozen=True, eq=False)
class BlockSkips:
    """Which samples go without what in one block."""

    video_values_only: Skipped = False
    video_input_only: Skipped = False
    audio_values_only: Skipped = False
    exchange: Skipped = False
    everything: Skipped = False


NO_SKIPS = BlockSkips()


def skips_of_block(perturbations: Sequence[Perturbation], block: int, device: torch.device) -> BlockSkips:
    """What the samples' perturbations mean for the block with this index."""

    def video(strategy: SkipStrategy) -> Skipped:
        return _skipped([p.strategy == strategy and block in p.video_self_attention for p in perturbations], device)

    return BlockSkips(
        video_values_only=video("values"),
        video_input_only=video("attention"),
        audio_values_only=_skipped([block in p.audio_self_attention for p in perturbations], device),
        exchange=_skipped([p.isolate_streams for p in perturbations], device),
        everything=video("block"),
    )


def _skipped(samples: list[bool], device: torch.device) -> Skipped:
    if all(samples) or not any(samples):
        return bool(samples) and samples[0]
    return torch.tensor(samples, device=device)


class FeedForward(nn.Module):
    """Two linear layers around a tanh GELU, token by token."""

    def __init__(self, width: int, bias: bool, ops: OpSet) -> None:
        super().__init__()
        self.widen = nn.Linear(width, FEED_FORWARD_FACTOR * width, bias=bias)
        self.narrow = nn.Linear(FEED_FORWARD_FACTOR * width, width, bias=bias)
        # If both are float8 layers, whoever makes them so says it here.
        self.in_float8 = False
        self.linear_gelu = ops.linear_gelu
        self.gelu_quantised = ops.gelu_quantised

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        if self.in_float8:
            return self.narrow(self.gelu_quantised(self.widen(x)))
        return self.narrow(self.linear_gelu(cast(Tensor, x), self.widen.weight, self.widen.bias))


class StreamLayers(nn.Module):
    """One stream's own layers in the block with index `layer`."""

    def __init__(self, layer: int, stream: StreamHparams, hparams: DenoiserHparams, ops: OpSet) -> None:
        super().__init__()
        self.layer = layer
        self.ops = ops
        self.norm_eps = hparams.norm_eps
        self.text_query_norm = hparams.text_query_norm
        self.self_attention = Attention(stream, stream.width, stream.width, hparams, ops)
        self.text_attention = Attention(stream, stream.width, stream.width, hparams, ops)
        self.feed_forward = FeedForward(stream.width, stream.feed_forward_bias, ops)
        # Rows: shift, scale, gate of self-attention; of the feed-forward; of the text attention's queries.
        self.table = nn.Parameter(torch.zeros(num_rows(hparams), stream.width))
        # Rows: shift, scale.
        self.text_table = nn.Parameter(torch.zeros(2, stream.width)) if hparams.text_modulation else None

    def attend(self, state: StreamState, values_only: Skipped, input_only: Skipped) -> StreamState:
        """Self-attention, then text attention, each added to the tokens."""
        given = state.conditioning
        modulation, gate_BKD = self._rows(state, 0)
        # Samples that keep their input need it as it is.
        as_rows = self.self_attention.reads_rows and input_only is False
        state, y = normed(state, modulation, self.norm_eps, self.ops, as_rows=as_rows)
        y_BTD = self.self_attention(
            y,
            y,
            bias=given.self_bias,
            rotary=given.rotary,
            key_rotary=given.rotary,
            values_only=values_only,
            input_only=input_only,
        )
        return self._attend_to_text(replace(state, branch=Branch(y_BTD, gate_BKD, modulation.index_BT)))

    def _attend_to_text(self, state: StreamState) -> StreamState:
        given = state.conditioning
        modulation, gate_BKD, text_rows_B12D = None, None, state.modulation.text_rows_B12D
        context: Tensor | KeysValues = given.text_BSD
        if self.text_table is not None and text_rows_B12D is not None:
            modulation, gate_BKD = self._rows(state, 6)
            text_shift_B1D, text_scale_B1D = (self.text_table + text_rows_B12D).unbind(dim=2)
            context = torch.addcmul(text_shift_B1D, given.text_BSD, 1 + text_scale_B1D)
        elif given.text_keys_values is not None:
            context = given.text_keys_values[self.layer]
        if self.text_query_norm or modulation is not None:
            as_rows = self.text_attention.reads_rows
            state, y = normed(state, modulation, self.norm_eps, self.ops, as_rows=as_rows)
        else:
            state = settled(state, self.ops)
            y = state.x_BTD
        y_BTD = self.text_attention(y, context, bias=given.text_bias)
        return replace(state, branch=Branch(y_BTD, gate_BKD, None if modulation is None else modulation.index_BT))

    def _rows(self, state: StreamState, first: int) -> tuple[Modulation, Tensor]:
        """What modulates a norm, and the gate of what comes of it, (B, K, D)."""
        rows_BK3D = self.table[first : first + 3] + state.modulation.rows_BKRD[:, :, first : first + 3]
        shift_BKD, scale_BKD, gate_BKD = rows_BK3D.unbind(dim=2)
        return Modulation(scale_BKD, shift_BKD, state.modulation.index_BT), gate_BKD

    def transform(self, state: StreamState) -> StreamState:
        """Feed-forward, added to the tokens."""
        modulation, gate_BKD = self._rows(state, 3)
        state, y = normed(state, modulation, self.norm_eps, self.ops, as_rows=self.feed_forward.in_float8)
        return replace(state, branch=Branch(self.feed_forward(y), gate_BKD, modulation.index_BT))


class Exchange(nn.Module):
    """What video takes from audio and audio from video, at the same time."""

    def __init__(self, audio: StreamHparams, hparams: DenoiserHparams, ops: OpSet) -> None:
        super().__init__()
        video = hparams.video
        self.ops = ops
        self.norm_eps = hparams.norm_eps
        # Both directions meet in the audio stream's heads.
        self.video_from_audio = Attention(audio, video.width, audio.width, hparams, ops)
        self.audio_from_video = Attention(audio, audio.width, video.width, hparams, ops)
        # Rows: scale, shift for audio to video; scale, shift for video to audio; gate. Scale comes first only here.
        self.video_table = nn.Parameter(torch.zeros(5, video.width))
        self.audio_table = nn.Parameter(torch.zeros(5, audio.width))

    def forward(
        self, video: StreamState, audio: StreamState, skipped: Skipped, audio_lane: Lane = INLINE
    ) -> tuple[StreamState, StreamState]:
        """Both directions read the streams as they were before either was updated. Skipped samples stay as they are."""
        video_rotary, audio_rotary = video.conditioning.exchange_rotary, audio.conditioning.exchange_rotary
        video, video_a2v, video_v2a = self._inputs(video, self.video_table)
        with audio_lane.work():
            audio, audio_a2v, audio_v2a = self._inputs(audio, self.audio_table)
        audio_lane.swap(audio_a2v, video_v2a)
        to_video_BTD = self.video_from_audio(video_a2v, audio_a2v, rotary=video_rotary, key_rotary=audio_rotary)
        video = self._take(video, to_video_BTD, self.video_table, skipped)
        with audio_lane.work():
            to_audio_BTD = self.audio_from_video(audio_v2a, video_v2a, rotary=audio_rotary, key_rotary=video_rotary)
            audio = self._take(audio, to_audio_BTD, self.audio_table, skipped)
        return video, audio

    def _inputs(
        self, state: StreamState, table_5D: Tensor
    ) -> tuple[StreamState, Tensor | ScaledRows, Tensor | ScaledRows]:
        """The settled stream, and what it brings to each direction, (B, T, D)."""
        exchange = _exchange_modulation(state)
        a2v_scale_BKD, a2v_shift_BKD, v2a_scale_BKD, v2a_shift_BKD = (table_5D[:4] + exchange.rows_BK4D).unbind(dim=2)
        a2v = Modulation(a2v_scale_BKD, a2v_shift_BKD, exchange.rows_index_BT)
        v2a = Modulation(v2a_scale_BKD, v2a_shift_BKD, exchange.rows_index_BT)
        state, y_a2v = normed(state, a2v, self.norm_eps, self.ops, as_rows=self.video_from_audio.reads_rows)
        state, y_v2a = normed(state, v2a, self.norm_eps, self.ops, as_rows=self.audio_from_video.reads_rows)
        return state, y_a2v, y_v2a

    def _take(self, state: StreamState, taken_BTD: Tensor, table_5D: Tensor, skipped: Skipped) -> StreamState:
        exchange = _exchange_modulation(state)
        gate_BKD = table_5D[4] + exchange.gate_BKD
        taken = replace(state, branch=Branch(taken_BTD, gate_BKD, exchange.gate_index_BT))
        if skipped is False:
            return taken
        return replace(state, x_BTD=where_skipped(skipped, state.x_BTD, settled(taken, self.ops).x_BTD))


class AudioVideoBlock(nn.Module):
    """The layer of the denoiser with index `layer`. Without audio in the hyper-parameters it has video layers only."""

    def __init__(self, layer: int, hparams: DenoiserHparams, ops: OpSet) -> None:
        super().__init__()
        audio = hparams.audio
        self.video = StreamLayers(layer, hparams.video, hparams, ops)
        self.audio = None if audio is None else StreamLayers(layer, audio, hparams, ops)
        self.exchange = None if audio is None else Exchange(audio, hparams, ops)

    def forward(
        self,
        video: StreamState | None,
        audio: StreamState | None,
        skips: BlockSkips = NO_SKIPS,
        audio_lane: Lane = INLINE,
    ) -> tuple[StreamState | None, StreamState | None]:
        """The streams updated, up to their last branch, audio in its lane; one that is None stays None."""
        if skips.everything is True:
            return video, audio
        video_before = video
        if video is not None:
            video = self.video.attend(video, skips.video_values_only, skips.video_input_only)
        if audio is not None and self.audio is not None:
            with audio_lane.work():
                audio = self.audio.attend(audio, skips.audio_values_only, False)
        if video is not None and audio is not None and self.exchange is not None and skips.exchange is not True:
            video, audio = self.exchange(video, audio, skips.exchange, audio_lane)
        if video is not None and video_before is not None:
            video = self.video.transform(video)
            if skips.everything is not False:
                before, after = settled(video_before, self.video.ops), settled(video, self.video.ops)
                video = replace(after, x_BTD=where_skipped(skips.everything, before.x_BTD, after.x_BTD))
        if audio is not None and self.audio is not None:
            with audio_lane.work():
                audio = self.audio.transform(audio)
        return video, audio


def num_rows(hparams: DenoiserHparams) -> int:
    """Rows of a stream's modulation by its timesteps in each block: shift, scale, gate of what is modulated."""
    return 9 if hparams.text_modulation else 6


def _exchange_modulation(state: StreamState) -> ExchangeModulation:
    if state.modulation.exchange is None:
        raise ValueError("both streams must be modulated for an exchange, got one modulated as if it were alone")
    return state.modulation.exchange
