"""One audio-video block: each stream attends to itself and its text, the two take from each other, each is transformed.

Either stream may be absent. Norms, gates and attention are operations handed in.

Shape suffixes: B batch, T tokens of a stream, S text tokens, D channels of the stream, K distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from pipeline.model.attention import Attention, Skipped
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.modulation import StreamModulation
from pipeline.model.streams import Perturbation, StreamConditioning

FEED_FORWARD_FACTOR = 4


@dataclass(frozen=True, eq=False)
class StreamState:
    """A stream on its way through the blocks: its tokens, and what all blocks of the step are given for it."""

    x_BTD: Tensor
    conditioning: StreamConditioning
    modulation: StreamModulation


@dataclass(frozen=True, eq=False)
class BlockSkips:
    """Which samples go without what in one block."""

    video_self_attention: Skipped = False
    audio_self_attention: Skipped = False
    exchange: Skipped = False


NO_SKIPS = BlockSkips()


def skips_of_block(perturbations: Sequence[Perturbation], block: int, device: torch.device) -> BlockSkips:
    """What the samples' perturbations mean for the block with this index."""
    return BlockSkips(
        video_self_attention=_skipped([block in p.video_self_attention for p in perturbations], device),
        audio_self_attention=_skipped([block in p.audio_self_attention for p in perturbations], device),
        exchange=_skipped([p.isolate_streams for p in perturbations], device),
    )


def _skipped(samples: list[bool], device: torch.device) -> Skipped:
    if all(samples) or not any(samples):
        return bool(samples) and samples[0]
    return torch.tensor(samples, device=device)


class FeedForward(nn.Module):
    """Two linear layers around a tanh GELU, token by token."""

    def __init__(self, width: int, ops: OpSet) -> None:
        super().__init__()
        self.widen = nn.Linear(width, FEED_FORWARD_FACTOR * width)
        self.narrow = nn.Linear(FEED_FORWARD_FACTOR * width, width)
        self.activation = ops.gelu_tanh

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.narrow(self.activation(self.widen(x_BTD)))


class StreamLayers(nn.Module):
    """One stream's own layers in a block."""

    def __init__(self, stream: StreamHparams, norm_eps: float, ops: OpSet) -> None:
        super().__init__()
        self.ops = ops
        self.norm_eps = norm_eps
        self.self_attention = _attention(stream, stream.width, stream.width, norm_eps, ops)
        self.text_attention = _attention(stream, stream.width, stream.width, norm_eps, ops)
        self.feed_forward = FeedForward(stream.width, ops)
        # Rows: shift, scale, gate of self-attention; shift, scale, gate of the feed-forward.
        self.table = nn.Parameter(torch.zeros(6, stream.width))

    def attend(self, state: StreamState, skipped: Skipped) -> StreamState:
        """Self-attention, then text attention (queries normed but not modulated), each added to the tokens."""
        x_BTD, given, index_BT = state.x_BTD, state.conditioning, state.modulation.index_BT
        shift_BKD, scale_BKD, gate_BKD = (self.table[:3] + state.modulation.rows_BK6D[:, :, :3]).unbind(dim=2)
        y_BTD = self.ops.modulated_rms_norm(x_BTD, scale_BKD, shift_BKD, index_BT, self.norm_eps)
        y_BTD = self.self_attention(
            y_BTD, y_BTD, bias=given.self_bias, rotary=given.rotary, key_rotary=given.rotary, skipped=skipped
        )
        x_BTD = self.ops.gated_residual(x_BTD, y_BTD, gate_BKD, index_BT)
        y_BTD = self.ops.rms_norm(x_BTD, self.norm_eps)
        x_BTD = x_BTD + self.text_attention(y_BTD, given.text_BSD, bias=given.text_bias)
        return replace(state, x_BTD=x_BTD)

    def transform(self, state: StreamState) -> StreamState:
        """Feed-forward, added to the tokens."""
        index_BT = state.modulation.index_BT
        shift_BKD, scale_BKD, gate_BKD = (self.table[3:] + state.modulation.rows_BK6D[:, :, 3:]).unbind(dim=2)
        y_BTD = self.ops.modulated_rms_norm(state.x_BTD, scale_BKD, shift_BKD, index_BT, self.norm_eps)
        return replace(state, x_BTD=self.ops.gated_residual(state.x_BTD, self.feed_forward(y_BTD), gate_BKD, index_BT))


class Exchange(nn.Module):
    """What video takes from audio and audio from video, at the same time."""

    def __init__(self, video: StreamHparams, audio: StreamHparams, norm_eps: float, ops: OpSet) -> None:
        super().__init__()
        self.ops = ops
        self.norm_eps = norm_eps
        # Both directions meet in the audio stream's heads.
        self.video_from_audio = _attention(audio, video.width, audio.width, norm_eps, ops)
        self.audio_from_video = _attention(audio, audio.width, video.width, norm_eps, ops)
        # Rows: scale, shift for audio to video; scale, shift for video to audio; gate. Scale comes first only here.
        self.video_table = nn.Parameter(torch.zeros(5, video.width))
        self.audio_table = nn.Parameter(torch.zeros(5, audio.width))

    def forward(self, video: StreamState, audio: StreamState, skipped: Skipped) -> tuple[StreamState, StreamState]:
        """Both directions read the streams as they were before either was updated. Skipped samples stay as they are."""
        video_a2v, video_v2a, video_gate = self._inputs(video, self.video_table)
        audio_a2v, audio_v2a, audio_gate = self._inputs(audio, self.audio_table)
        video_rotary, audio_rotary = video.conditioning.exchange_rotary, audio.conditioning.exchange_rotary
        to_video_BTD = self.video_from_audio(video_a2v, audio_a2v, rotary=video_rotary, key_rotary=audio_rotary)
        to_audio_BTD = self.audio_from_video(audio_v2a, video_v2a, rotary=audio_rotary, key_rotary=video_rotary)
        return self._take(video, to_video_BTD, video_gate, skipped), self._take(
            audio, to_audio_BTD, audio_gate, skipped
        )

    def _inputs(self, state: StreamState, table_5D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a stream brings to each direction, (B, T, D), and the gate (B, 1, D) of what it takes."""
        modulation = state.modulation
        if modulation.exchange is None:
            raise ValueError("both streams must be modulated for an exchange, got one modulated as if it were alone")
        rows_BK4D = table_5D[:4] + modulation.exchange.rows_BK4D
        a2v_scale_BKD, a2v_shift_BKD, v2a_scale_BKD, v2a_shift_BKD = rows_BK4D.unbind(dim=2)
        norm, index_BT = self.ops.modulated_rms_norm, modulation.index_BT
        return (
            norm(state.x_BTD, a2v_scale_BKD, a2v_shift_BKD, index_BT, self.norm_eps),
            norm(state.x_BTD, v2a_scale_BKD, v2a_shift_BKD, index_BT, self.norm_eps),
            table_5D[4] + modulation.exchange.gate_B1D,
        )

    def _take(self, state: StreamState, taken_BTD: Tensor, gate_B1D: Tensor, skipped: Skipped) -> StreamState:
        x_BTD = self.ops.gated_residual(state.x_BTD, taken_BTD, gate_B1D, None)
        if isinstance(skipped, Tensor):
            x_BTD = torch.where(skipped[:, None, None], state.x_BTD, x_BTD)
        return replace(state, x_BTD=x_BTD)


class AudioVideoBlock(nn.Module):
    """One layer of the denoiser. Without audio in the hyper-parameters it has video layers only."""

    def __init__(self, hparams: DenoiserHparams, ops: OpSet) -> None:
        super().__init__()
        video, audio, norm_eps = hparams.video, hparams.audio, hparams.norm_eps
        self.video = StreamLayers(video, norm_eps, ops)
        self.audio = None if audio is None else StreamLayers(audio, norm_eps, ops)
        self.exchange = None if audio is None else Exchange(video, audio, norm_eps, ops)

    def forward(
        self, video: StreamState | None, audio: StreamState | None, skips: BlockSkips = NO_SKIPS
    ) -> tuple[StreamState | None, StreamState | None]:
        """The streams with their tokens updated; one that is None stays None."""
        if video is not None:
            video = self.video.attend(video, skips.video_self_attention)
        if audio is not None and self.audio is not None:
            audio = self.audio.attend(audio, skips.audio_self_attention)
        if video is not None and audio is not None and self.exchange is not None and skips.exchange is not True:
            video, audio = self.exchange(video, audio, skips.exchange)
        if video is not None:
            video = self.video.transform(video)
        if audio is not None and self.audio is not None:
            audio = self.audio.transform(audio)
        return video, audio


def _attention(heads_of: StreamHparams, query_dim: int, context_dim: int, norm_eps: float, ops: OpSet) -> Attention:
    return Attention(
        query_dim=query_dim,
        context_dim=context_dim,
        num_heads=heads_of.num_heads,
        head_dim=heads_of.head_dim,
        norm_eps=norm_eps,
        ops=ops,
    )
