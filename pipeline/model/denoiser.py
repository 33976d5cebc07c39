"""The denoiser for one device: embed both streams, run the blocks, project back to a velocity.

Sampling, guidance, latents and text encoding are elsewhere; so is everything that knows of several devices.

Shape suffixes: B batch, T tokens of a stream, S text tokens, C channels of a latent token, D channels of the stream,
K distinct timesteps of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from pipeline.model.block import NO_SKIPS, AudioVideoBlock, StreamLayers, num_rows, skips_of_block
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.lane import INLINE, Lane
from pipeline.model.modulation import ExchangeModulation, StreamModulation, TimestepModulation
from pipeline.model.rope import rotary_table
from pipeline.model.share import WHOLE
from pipeline.model.state import StreamState, settled
from pipeline.model.streams import (
    Conditioning,
    DistinctTimesteps,
    Perturbation,
    StreamConditioning,
    TokenStream,
    attention_bias,
    text_bias,
)

StatePair = tuple[StreamState | None, StreamState | None]
"""Video and audio between two blocks; None for a stream not given."""

OthersFn = Callable[[StatePair, StatePair, Callable[[], StatePair]], StatePair]
"""(before the first block, after it, what runs the other blocks) -> after the last block"""


class Denoiser(Protocol):
    """What sampling needs of a denoiser, be it on one device or on several: see `AudioVideoDenoiser`."""

    @property
    def hparams(self) -> DenoiserHparams: ...

    def prepare(self, video: TokenStream | None, audio: TokenStream | None) -> Conditioning: ...

    def __call__(
        self,
        video: TokenStream | None,
        audio: TokenStream | None,
        conditioning: Conditioning | None = None,
        perturbations: Sequence[Perturbation] | None = None,
        others: OthersFn | None = None,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def overlap_audio(self, stream: torch.cuda.Stream | None) -> None: ...


class TextProjection(nn.Module):
    """Text embeddings to the width of a stream."""

    def __init__(self, text_channels: int, width: int, ops: OpSet) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_channels, width)
        self.linear_2 = nn.Linear(width, width)
        self.activation = ops.gelu_tanh

    def forward(self, text_BSD: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(text_BSD)))


class StreamEnds(nn.Module):
    """What one stream passes before and after the blocks."""

    def __init__(self, stream: StreamHparams, hparams: DenoiserHparams, ops: OpSet) -> None:
        super().__init__()
        self.stream = stream
        self.hparams = hparams
        self.ops = ops
        # The heads that the blocks compute.
        self.share = WHOLE
        self.embed = nn.Linear(stream.in_channels, stream.width)
        self.text_projection = (
            None if hparams.text_channels is None else TextProjection(hparams.text_channels, stream.width, ops)
        )
        self.adaln = TimestepModulation(num_rows(hparams), stream.width)
        self.prompt_adaln = TimestepModulation(2, stream.width) if hparams.text_modulation else None
        self.keyframe_marker = nn.Parameter(torch.zeros(1, stream.width)) if stream.keyframe_marker else None
        if hparams.audio is not None:
            self.exchange_adaln = TimestepModulation(4, stream.width)
            self.exchange_gate_adaln = TimestepModulation(1, stream.width)
        # Rows: shift, scale.
        self.head_table = nn.Parameter(torch.zeros(2, stream.width))
        self.head = nn.Linear(stream.width, stream.out_channels)

    def prepare(self, given: TokenStream, layers: Sequence[StreamLayers]) -> StreamConditioning:
        """What of the stream's conditioning outlasts a step; `layers` are the stream's own of each block."""
        dtype = self.embed.weight.dtype
        exchange_rotary = None
        if self.hparams.audio is not None:
            video, audio = self.hparams.video, self.hparams.audio
            seconds = max(video.max_positions[0], audio.max_positions[0])
            time_BA2 = given.positions_BAT2[:, :1]
            exchange_rotary = rotary_table(
                time_BA2, (seconds,), audio.num_heads, audio.width, self.hparams.rotary, self.share
            )
        stream, text_BSD = self.stream, given.text_BSD.to(dtype)
        if self.text_projection is not None:
            text_BSD = self.text_projection(text_BSD)
        text_keys_values = None
        if not self.hparams.text_modulation:
            text_keys_values = tuple(layer.text_attention.keys_values(text_BSD) for layer in layers)
        return StreamConditioning(
            text_BSD=text_BSD,
            text_keys_values=text_keys_values,
            text_bias=text_bias(given.text_mask_BS, dtype, self.hparams.hidden_text_bias),
            self_bias=attention_bias(given.attention_mask_BTT, dtype),
            rotary=rotary_table(
                given.positions_BAT2,
                stream.max_positions,
                stream.num_heads,
                stream.width,
                self.hparams.rotary,
                self.share,
            ),
            exchange_rotary=exchange_rotary,
        )

    def embed_tokens(self, given: TokenStream) -> Tensor:
        """What the first block is given, (B, T, D). ValueError if keyframes are to be marked and none are named."""
        x_BTD = self.embed(given.tokens_BTC.to(self.embed.weight.dtype))
        if self.keyframe_marker is None:
            return x_BTD
        if given.keyframes_mask_BT is None:
            raise ValueError("keyframes_mask_BT must be given to a denoiser with a keyframe marker, got None")
        return x_BTD + given.keyframes_mask_BT.to(x_BTD.dtype)[..., None] * self.keyframe_marker

    def modulate(self, given: TokenStream, other: TokenStream | None) -> StreamModulation:
        """Modulation of one step. `other` is the other stream of the call, if any."""
        rows_BKRD, embedded_BKD = self.adaln(given.timesteps.values_BK * self.hparams.timestep_scale)
        text_rows_B12D = None
        if self.prompt_adaln is not None:
            text_rows_B12D, _ = self.prompt_adaln(given.sigma_B[:, None] * self.hparams.timestep_scale)
        exchange = None if other is None else self._modulate_exchange(given, other)
        return StreamModulation(given.timesteps.index_BT, rows_BKRD, embedded_BKD, text_rows_B12D, exchange)

    def _modulate_exchange(self, given: TokenStream, other: TokenStream) -> ExchangeModulation:
        rule, others_level = self.hparams.exchange_timesteps, DistinctTimesteps.uniform(other.sigma_B)
        for_rows = others_level if rule == "1.0.0" else given.timesteps
        for_gate = given.timesteps if rule == "first" else others_level
        rows_BK4D, _ = self.exchange_adaln(for_rows.values_BK * self.hparams.timestep_scale)
        gate_BK1D, _ = self.exchange_gate_adaln(for_gate.values_BK * self.hparams.exchange_gate_timestep_scale)
        return ExchangeModulation(rows_BK4D, for_rows.index_BT, gate_BK1D.squeeze(2), for_gate.index_BT)

    def project_out(self, x_BTD: Tensor, modulation: StreamModulation) -> Tensor:
        """Velocity, (B, T, C)."""
        shift_BKD, scale_BKD = (self.head_table + modulation.embedded_BKD[:, :, None]).unbind(dim=2)
        return self.head(
            self.ops.modulated_layer_norm(x_BTD, scale_BKD, shift_BKD, modulation.index_BT, self.hparams.norm_eps)
        )


class AudioVideoDenoiser(nn.Module):
    """Predicts the velocity of video and audio tokens together, or of either alone.

    Token layouts, timesteps and positions are described at `TokenStream`. Parameters start as torch leaves them: use
    `pipeline.model.checkpoint.load_denoiser` for a model that means something.
    """

    def __init__(self, hparams: DenoiserHparams, ops: OpSet) -> None:
        super().__init__()
        self.hparams = hparams
        self.video = StreamEnds(hparams.video, hparams, ops)
        self.audio = None if hparams.audio is None else StreamEnds(hparams.audio, hparams, ops)
        self._audio_lane = INLINE
        self.blocks = nn.ModuleList(AudioVideoBlock(layer, hparams, ops) for layer in range(hparams.num_layers))

    def prepare(self, video: TokenStream | None, audio: TokenStream | None) -> Conditioning:
        """Text projections, keys and values of text, masks and rotary tables: all that does not depend on tokens,
        timesteps or noise levels.

        Valid for every call whose streams have the same text, masks and positions, until weights change.
        """
        self._require_streams_fit(video, audio)
        video_layers = cast(list[StreamLayers], [block.video for block in self.blocks])
        audio_layers = cast(list[StreamLayers], [block.audio for block in self.blocks])
        return Conditioning(
            video=None if video is None else self.video.prepare(video, video_layers),
            audio=None if audio is None or self.audio is None else self.audio.prepare(audio, audio_layers),
        )

    def forward(
        self,
        video: TokenStream | None,
        audio: TokenStream | None,
        conditioning: Conditioning | None = None,
        perturbations: Sequence[Perturbation] | None = None,
        others: OthersFn | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (B, T, C) of video and audio, in the dtype of the weights; None for a stream not given.

        `conditioning` is what `prepare` returned for streams with this text, these masks and positions, and is computed
        here if absent. `perturbations` has one entry a sample. `others` says what becomes of the blocks after the
        first; without it they are run. ValueError if an argument does not fit the others.
        """
        self._require_streams_fit(video, audio)
        if conditioning is None:
            conditioning = self.prepare(video, audio)
        if perturbations is not None:
            _require_fitting(perturbations, video, audio)

        # Skips are made and dropped block by block on the caller's side, so then audio stays there too; and so it does
        # for `others`, which looks at both streams.
        lane = self._audio_lane if video is not None and perturbations is None and others is None else INLINE
        with lane.beside():
            video_state = _enter(self.video, video, audio, conditioning.video)
            with lane.work():
                audio_state = _enter(self.audio, audio, video, conditioning.audio)

            def run(states: StatePair, first: int, end: int) -> StatePair:
                for index in range(first, end):
                    skips = NO_SKIPS
                    if perturbations is not None:
                        skips = skips_of_block(perturbations, index, self.video.embed.weight.device)
                    states = self.blocks[index](*states, skips, lane)
                return states

            entered, num_blocks = (video_state, audio_state), len(self.blocks)
            if others is None:
                video_state, audio_state = run(entered, 0, num_blocks)
            else:
                after_first = run(entered, 0, 1)
                video_state, audio_state = others(entered, after_first, lambda: run(after_first, 1, num_blocks))
            video_BTC = _leave(self.video, video_state)
            with lane.work():
                audio_BTC = _leave(self.audio, audio_state)
        return video_BTC, audio_BTC

    def overlap_audio(self, stream: torch.cuda.Stream | None) -> None:
        """Queue the audio stream's work on `stream`, beside the video's; None: in turns with it."""
        self._audio_lane = Lane(stream)

    def _require_streams_fit(self, video: TokenStream | None, audio: TokenStream | None) -> None:
        if video is None and audio is None:
            raise ValueError("a call must have a video or an audio stream, got neither")
        if audio is not None and self.audio is None:
            raise ValueError("audio must be None for a video-only denoiser, got a stream")


def _enter(
    ends: StreamEnds | None, given: TokenStream | None, other: TokenStream | None, prepared: StreamConditioning | None
) -> StreamState | None:
    """A stream as the first block gets it; None for a stream not given."""
    if ends is None or given is None:
        return None
    num_tokens = given.tokens_BTC.shape[1]
    num_prepared = None if prepared is None else prepared.rotary.cos_BHTP.shape[2]
    if prepared is None or num_prepared != num_tokens:
        raise ValueError(f"conditioning must be prepared for {num_tokens} tokens, got {num_prepared}")
    return StreamState(ends.embed_tokens(given), prepared, ends.modulate(given, other))


def _leave(ends: StreamEnds | None, state: StreamState | None) -> Tensor | None:
    """Velocities of a stream after the last block; None for a stream not given."""
    if ends is None or state is None:
        return None
    return ends.project_out(settled(state, ends.ops).x_BTD, state.modulation)


def _require_fitting(
    perturbations: Sequence[Perturbation], video: TokenStream | None, audio: TokenStream | None
) -> None:
    batch_sizes = {stream.tokens_BTC.shape[0] for stream in (video, audio) if stream is not None}
    if batch_sizes != {len(perturbations)}:
        raise ValueError(
            f"perturbations must have one entry for each of {sorted(batch_sizes)}, got {len(perturbations)}"
        )
    strategies = sorted({perturbation.strategy for perturbation in perturbations} - {"values"})
    if audio is not None and strategies:
        raise ValueError(f"perturbations of a call with audio must have the strategy 'values', got {strategies}")
