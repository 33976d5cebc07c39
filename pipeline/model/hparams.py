"""What a denoiser is built from: sizes and constants read from the metadata of its checkpoint.

Only the LTX-2.0 architecture is known. Metadata that asks for anything else is refused here, with everything that is
in the way, because a flag without tensors of its own (a rotary layout, say) would otherwise render noise in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import CheckpointMismatch

Number = TypeVar("Number", int, float)

# Switches of the architecture and the one value of each that this version computes; an absent one counts as this value
# where LTX-2.0 files may leave it out (second table).
_REQUIRED_VALUES: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "av_cross_ada_norm": True,
    "frequencies_precision": "float64",
    "norm_elementwise_affine": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "standardization_norm": "rms_norm",
    "use_audio_video_cross_attention": True,
    "use_middle_indices_grid": True,
}
_OPTIONAL_VALUES: dict[str, Any] = {
    "attention_type": "default",
    "cross_attention_norm": True,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "share_ff": False,
    "upcast_attention": False,
    "use_linear_projection": False,
}
_SIZES = {
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "caption_channels",
    "norm_eps",
    "positional_embedding_theta",
    "positional_embedding_max_pos",
    "timestep_scale_multiplier",
}
_AUDIO_SIZES = {
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "audio_out_channels",
    "audio_cross_attention_dim",
    "audio_positional_embedding_max_pos",
    "av_ca_timestep_scale_multiplier",
}
# Of no effect on the denoiser: training, the VAE's causality (it is in the positions), the text connectors.
_UNUSED = {
    "_diffusers_version",
    "audio_in_channels",
    "causal_temporal_positioning",
    "dropout",
    "norm_num_groups",
    "num_embeds_ada_norm",
    "use_embeddings_connector",
    "connector_attention_head_dim",
    "connector_num_attention_heads",
    "connector_num_layers",
    "connector_positional_embedding_max_pos",
    "connector_num_learnable_registers",
    "connector_norm_output",
}
# Published files leave it out.
_DEFAULT_AUDIO_IN_CHANNELS = 128


@dataclass(frozen=True)
class StreamHparams:
    """One stream: video or audio."""

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    # Extent of the rotary grid along each position axis: seconds, then pixels.
    max_positions: tuple[int, ...]

    @property
    def width(self) -> int:
        """Channels of a token inside the model."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class DenoiserHparams:
    """The whole denoiser. Without audio it is the video-only kind."""

    num_layers: int
    video: StreamHparams
    audio: StreamHparams | None
    text_channels: int
    norm_eps: float
    rope_theta: float
    timestep_scale: float
    # Of the noise level that gates what one stream takes from the other.
    exchange_gate_timestep_scale: float

    @classmethod
    def from_config(
        cls, transformer: Mapping[str, Any], *, has_audio: bool = True, source: str = "checkpoint metadata"
    ) -> DenoiserHparams:
        """From the `transformer` section of a checkpoint's metadata; `source` names the file in messages.

        Raises one CheckpointMismatch that lists missing and malformed keys and everything not supported yet.
        """
        _require_nothing_unknown(transformer, has_audio, source)
        reader = _Reader(transformer)
        hparams = cls(
            num_layers=reader.positive("num_layers", int),
            video=reader.stream("", num_axes=3, in_channels=reader.positive("in_channels", int)),
            audio=reader.stream("audio_", num_axes=1, in_channels=reader.audio_in_channels()) if has_audio else None,
            text_channels=reader.positive("caption_channels", int),
            norm_eps=reader.positive("norm_eps", float),
            rope_theta=reader.positive("positional_embedding_theta", float),
            timestep_scale=reader.positive("timestep_scale_multiplier", float),
            exchange_gate_timestep_scale=reader.positive("av_ca_timestep_scale_multiplier", float)
            if has_audio
            else 1.0,
        )
        if reader.problems:
            raise CheckpointMismatch(
                f"{source}: section 'transformer' must describe an LTX-2.0 denoiser, got "
                f"{'; '.join(reader.problems)}; use a published file"
            )
        return hparams


class _Reader:
    """Reads typed values and collects what is wrong; what it returns counts only if there are no problems."""

    def __init__(self, transformer: Mapping[str, Any]) -> None:
        self.transformer = transformer
        self.problems: list[str] = []

    def positive(self, key: str, kind: type[Number]) -> Number:
        value = self.transformer[key]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value <= 0 or (kind is int and value != int(value)):
            self.problems.append(f"{key}={value!r} instead of a positive {'whole ' if kind is int else ''}number")
            return kind(1)
        return kind(value)

    def audio_in_channels(self) -> int:
        if "audio_in_channels" not in self.transformer:
            return _DEFAULT_AUDIO_IN_CHANNELS
        return self.positive("audio_in_channels", int)

    def stream(self, prefix: str, num_axes: int, in_channels: int) -> StreamHparams:
        stream = StreamHparams(
            in_channels=in_channels,
            out_channels=self.positive(f"{prefix}out_channels", int),
            num_heads=self.positive(f"{prefix}num_attention_heads", int),
            head_dim=self.positive(f"{prefix}attention_head_dim", int),
            max_positions=self._max_positions(f"{prefix}positional_embedding_max_pos", num_axes),
        )
        text_width = self.transformer[f"{prefix}cross_attention_dim"]
        if text_width != stream.width:
            self.problems.append(
                f"{prefix}cross_attention_dim={text_width!r} instead of heads x head dim = {stream.width}"
            )
        return stream

    def _max_positions(self, key: str, num_axes: int) -> tuple[int, ...]:
        value = self.transformer[key]
        whole = isinstance(value, list) and all(isinstance(extent, int) and extent > 0 for extent in value)
        if not whole or len(value) != num_axes:
            self.problems.append(f"{key}={value!r} instead of {num_axes} positive whole numbers")
            return (1,) * num_axes
        return tuple(value)


def _require_nothing_unknown(transformer: Mapping[str, Any], has_audio: bool, source: str) -> None:
    sizes = _SIZES | _AUDIO_SIZES if has_audio else _SIZES
    missing = sorted((sizes | _REQUIRED_VALUES.keys()) - transformer.keys())
    values = _REQUIRED_VALUES | _OPTIONAL_VALUES
    known = values.keys() | _SIZES | _AUDIO_SIZES | _UNUSED
    unsupported = sorted(
        f"{key}={value!r}"
        for key, value in transformer.items()
        if key not in known or (key in values and value != values[key])
    )
    parts = []
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if unsupported:
        parts.append(f"not supported yet: {', '.join(unsupported)}")
    if parts:
        raise CheckpointMismatch(
            f"{source}: section 'transformer' must describe an LTX-2.0 denoiser, got {'; '.join(parts)}; "
            "use an ltx-2-19b checkpoint"
        )
