"""What a denoiser is built from: sizes, constants and rules, read from the metadata of its checkpoint.

One class of denoiser computes LTX-2.0, 2.3, 2.5 and LTX-Video 0.9.8; they differ by these values only. Which keys the
metadata may have is in `metadata.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.model.metadata import AUDIO_VIDEO_CLASS, Reader, mismatch, require_known, text_arrives_projected

ExchangeTimesteps = Literal["1.2.0", "1.0.0", "first"]
"""Which timesteps modulate what streams take from each other, by the LTX-2 release that did so.

"1.2.0": scale and shift by the stream's own timesteps, the gate by the other stream's noise level. "1.0.0": all by the
other stream's noise level. "first": all by the stream's own timesteps. All agree where every token of both streams has
the same timestep. No file says which it was trained with; the published models are used with "1.2.0".
"""

# Published files leave it out.
_DEFAULT_AUDIO_IN_CHANNELS = 128
# Of LTX-Video's query and key norms, whatever its metadata says of the other norms.
_LTX_VIDEO_QK_NORM_EPS = 1e-5
_LTX_VIDEO_HIDDEN_TEXT_BIAS = -10000.0


@dataclass(frozen=True)
class StreamHparams:
    """One stream: video or audio."""

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    # Extent of the rotary grid along each position axis: seconds, then pixels.
    max_positions: tuple[int, ...]
    feed_forward_bias: bool = True
    # A learned vector marks the tokens of latents that stand for a single frame.
    keyframe_marker: bool = False

    @property
    def width(self) -> int:
        """Channels of a token inside the model."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class RotaryHparams:
    """How positions become rotations. The defaults are LTX-2's."""

    theta: float
    # Rotated pairs are neighbouring channels, else the two halves of a head.
    interleaved: bool = False
    # A token is where it starts, else at the middle of its extent.
    at_start: bool = False
    # Precision of the frequencies before they are rounded to float32.
    float64_grid: bool = True


@dataclass(frozen=True)
class DenoiserHparams:
    """The whole denoiser. Without audio it is the video-only kind."""

    num_layers: int
    video: StreamHparams
    audio: StreamHparams | None
    # Of the text embeddings; None if they arrive at the width of each stream and are not projected here.
    text_channels: int | None
    norm_eps: float
    qk_norm_eps: float
    rotary: RotaryHparams
    timestep_scale: float
    # Of the noise level that gates what one stream takes from the other.
    exchange_gate_timestep_scale: float
    exchange_timesteps: ExchangeTimesteps = "1.2.0"
    # Every head of every attention has a gate, computed from the query's input.
    gated_attention: bool = False
    # Queries of the text attention are normed before it (LTX-Video: taken as they are).
    text_query_norm: bool = True
    # Text attention is modulated: its queries and its result by the timesteps, the text by the noise level.
    text_modulation: bool = False
    # What hides a text token; None: the most negative number of the dtype.
    hidden_text_bias: float | None = None

    @property
    def family(self) -> str:
        """ltx2 or ltx_video. LTX-Video's positions are where a token starts, LTX-2's the middle of its extent."""
        return "ltx_video" if self.rotary.at_start else "ltx2"

    @classmethod
    def from_config(
        cls, transformer: Mapping[str, Any], *, has_audio: bool = True, source: str = "checkpoint metadata"
    ) -> DenoiserHparams:
        """From the `transformer` section of a checkpoint's metadata; `source` names the file in messages.

        Raises one CheckpointMismatch that lists missing and malformed keys and everything not supported.
        """
        is_ltx_2 = transformer.get("_class_name") == AUDIO_VIDEO_CLASS
        has_audio = has_audio and is_ltx_2
        require_known(transformer, has_audio, source)
        reader = Reader(transformer)
        theta = reader.positive("positional_embedding_theta", float)
        norm_eps = reader.positive("norm_eps", float)
        hparams = cls(
            num_layers=reader.positive("num_layers", int),
            video=_video(reader),
            audio=_audio(reader) if has_audio else None,
            text_channels=None if text_arrives_projected(transformer) else reader.positive("caption_channels", int),
            norm_eps=norm_eps,
            qk_norm_eps=norm_eps if is_ltx_2 else _LTX_VIDEO_QK_NORM_EPS,
            rotary=RotaryHparams(theta)
            if is_ltx_2
            else RotaryHparams(theta, interleaved=True, at_start=True, float64_grid=False),
            timestep_scale=reader.positive("timestep_scale_multiplier", float),
            exchange_gate_timestep_scale=reader.positive("av_ca_timestep_scale_multiplier", float)
            if has_audio
            else 1.0,
            gated_attention=transformer.get("apply_gated_attention", False),
            text_query_norm=is_ltx_2,
            text_modulation=transformer.get("cross_attention_adaln", False),
            hidden_text_bias=None if is_ltx_2 else _LTX_VIDEO_HIDDEN_TEXT_BIAS,
        )
        if reader.problems:
            raise mismatch(source, reader.problems)
        return hparams


def _video(reader: Reader) -> StreamHparams:
    stream = StreamHparams(
        in_channels=reader.positive("in_channels", int),
        out_channels=reader.positive("out_channels", int),
        num_heads=reader.positive("num_attention_heads", int),
        head_dim=reader.positive("attention_head_dim", int),
        max_positions=reader.extents("positional_embedding_max_pos", 3),
        feed_forward_bias=reader.transformer.get("ff_bias", True),
        keyframe_marker=reader.transformer.get("use_keyframes_abs_pos_embedding", False),
    )
    reader.require_equal("cross_attention_dim", stream.width, "heads x head dim")
    return stream


def _audio(reader: Reader) -> StreamHparams:
    stream = StreamHparams(
        in_channels=reader.positive("audio_in_channels", int, _DEFAULT_AUDIO_IN_CHANNELS),
        out_channels=reader.positive("audio_out_channels", int),
        num_heads=reader.positive("audio_num_attention_heads", int),
        head_dim=reader.positive("audio_attention_head_dim", int),
        max_positions=reader.extents("audio_positional_embedding_max_pos", 1),
    )
    reader.require_equal("audio_cross_attention_dim", stream.width, "heads x head dim")
    return stream
