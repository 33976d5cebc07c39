"""The LTX-2.0 denoiser for one device: embed both streams, run the blocks, project back to a velocity.

Sampling, guidance, latents and text encoding are elsewhere; so is everything that knows of several devices.

Shape suffixes: B batch, T tokens of a stream, S text tokens, C channels of a latent token, D channels of the stream,
K distinct timesteps of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from pipeline.model.block import NO_SKIPS, AudioVideoBlock, StreamState, skips_of_block
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.modulation import ExchangeModulation, StreamModulation, TimestepModulation
from pipeline.model.rope import rotary_table
from pipeline.model.streams import (
    Conditioning,
    Perturbation,
    StreamConditioning,
    TokenStream,
    attention_bias,
    text_bias,
)


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
        self.modulated_layer_norm = ops.modulated_layer_norm
        self.embed = nn.Linear(stream.in_channels, stream.width)
        self.text_projection = TextProjection(hparams.text_channels, stream.width, ops)
        self.adaln = TimestepModulation(6, stream.width)
        if hparams.audio is not None:
            self.exchange_adaln = TimestepModulation(4, stream.width)
            self.exchange_gate_adaln = TimestepModulation(1, stream.width)
        # Rows: shift, scale.
        self.head_table = nn.Parameter(torch.zeros(2, stream.width))
        self.head = nn.Linear(stream.width, stream.out_channels)

    def prepare(self, given: TokenStream) -> StreamConditioning:
        """What of the stream's conditioning outlasts a step."""
        dtype = self.embed.weight.dtype
        exchange_rotary = None
        if self.hparams.audio is not None:
            video, audio = self.hparams.video, self.hparams.audio
            seconds = max(video.max_positions[0], audio.max_positions[0])
            time_BA2 = given.positions_BAT2[:, :1]
            exchange_rotary = rotary_table(time_BA2, (seconds,), audio.num_heads, audio.width, self.hparams.rope_theta)
        stream = self.stream
        return StreamConditioning(
            text_BSD=self.text_projection(given.text_BSD.to(dtype)),
            text_bias=text_bias(given.text_mask_BS, dtype),
            self_bias=attention_bias(given.attention_mask_BTT, dtype),
            rotary=rotary_table(
                given.positions_BAT2, stream.max_positions, stream.num_heads, stream.width, self.hparams.rope_theta
            ),
            exchange_rotary=exchange_rotary,
        )

    def modulate(self, given: TokenStream, other: TokenStream | None) -> StreamModulation:
        """Modulation of one step. `other` is the other stream of the call, if any."""
        scaled_BK = given.timesteps.values_BK * self.hparams.timestep_scale
        rows_BK6D, embedded_BKD = self.adaln(scaled_BK)
        exchange = None
        if other is not None:
            # Scale and shift by this stream's own timesteps, the gate by the other's noise level: LTX-2 release 1.2.0
            # behaviour. Earlier releases and diffusers differ where timesteps differ between tokens.
            rows_BK4D, _ = self.exchange_adaln(scaled_BK)
            gate_B11D, _ = self.exchange_gate_adaln(other.sigma_B[:, None] * self.hparams.exchange_gate_timestep_scale)
            exchange = ExchangeModulation(rows_BK4D, gate_B11D.squeeze(2))
        return StreamModulation(given.timesteps.index_BT, rows_BK6D, embedded_BKD, exchange)

    def project_out(self, x_BTD: Tensor, modulation: StreamModulation) -> Tensor:
        """Velocity, (B, T, C)."""
        shift_BKD, scale_BKD = (self.head_table + modulation.embedded_BKD[:, :, None]).unbind(dim=2)
        return self.head(
            self.modulated_layer_norm(x_BTD, scale_BKD, shift_BKD, modulation.index_BT, self.hparams.norm_eps)
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
        self.blocks = nn.ModuleList(AudioVideoBlock(hparams, ops) for _ in range(hparams.num_layers))

    def prepare(self, video: TokenStream | None, audio: TokenStream | None) -> Conditioning:
        """Text projections, masks and rotary tables: all that does not depend on tokens, timesteps or noise levels.

        Valid for every call whose streams have the same text, masks and positions.
        """
        self._require_streams_fit(video, audio)
        return Conditioning(
            video=None if video is None else self.video.prepare(video),
            audio=None if audio is None or self.audio is None else self.audio.prepare(audio),
        )

    def forward(
        self,
        video: TokenStream | None,
        audio: TokenStream | None,
        conditioning: Conditioning | None = None,
        perturbations: Sequence[Perturbation] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (B, T, C) of video and audio, in the dtype of the weights; None for a stream not given.

        `conditioning` is what `prepare` returned for streams with this text, these masks and positions, and is computed
        here if absent. `perturbations` has one entry a sample. ValueError if an argument does not fit the others.
        """
        self._require_streams_fit(video, audio)
        if conditioning is None:
            conditioning = self.prepare(video, audio)
        if perturbations is not None:
            _require_one_per_sample(perturbations, video, audio)

        video_state = _enter(self.video, video, audio, conditioning.video)
        audio_state = _enter(self.audio, audio, video, conditioning.audio)
        for index, block in enumerate(self.blocks):
            skips = NO_SKIPS
            if perturbations is not None:
                skips = skips_of_block(perturbations, index, self.video.embed.weight.device)
            video_state, audio_state = block(video_state, audio_state, skips)
        return _leave(self.video, video_state), _leave(self.audio, audio_state)

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
    x_BTD = ends.embed(given.tokens_BTC.to(ends.embed.weight.dtype))
    return StreamState(x_BTD, prepared, ends.modulate(given, other))


def _leave(ends: StreamEnds | None, state: StreamState | None) -> Tensor | None:
    return None if ends is None or state is None else ends.project_out(state.x_BTD, state.modulation)


def _require_one_per_sample(
    perturbations: Sequence[Perturbation], video: TokenStream | None, audio: TokenStream | None
) -> None:
    batch_sizes = {stream.tokens_BTC.shape[0] for stream in (video, audio) if stream is not None}
    if batch_sizes != {len(perturbations)}:
        raise ValueError(
            f"perturbations must have one entry for each of {sorted(batch_sizes)}, got {len(perturbations)}"
        )
