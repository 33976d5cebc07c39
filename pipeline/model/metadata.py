"""What the `transformer` section of a checkpoint's metadata may say: known keys, and typed reading of their values.

A flag without tensors of its own (a rotary layout, say) would render noise in silence if it were ignored, so every key
must be known and every switch have a value that is computed here. What the values mean for the model is in
`hparams.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import CheckpointMismatch

Number = TypeVar("Number", int, float)

AUDIO_VIDEO_CLASS = "AVTransformer3DModel"
VIDEO_CLASS = "Transformer3DModel"


class Family(NamedTuple):
    """The keys of one class of denoiser.

    `required` and `optional` hold switches with the one value of each that is computed; an absent optional one counts
    as this value. `flags` may be true, false or absent.
    """

    required: dict[str, Any]
    optional: dict[str, Any]
    flags: frozenset[str]
    sizes: frozenset[str]
    audio_sizes: frozenset[str]


_SWITCHES: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
}
_OPTIONAL_SWITCHES: dict[str, Any] = {
    "attention_type": "default",
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
}
_SIZES = frozenset(
    {
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
)
_FAMILIES = {
    AUDIO_VIDEO_CLASS: Family(
        required=_SWITCHES
        | {
            "av_cross_ada_norm": True,
            "frequencies_precision": "float64",
            "rope_type": "split",
            "use_audio_video_cross_attention": True,
            "use_middle_indices_grid": True,
        },
        optional=_OPTIONAL_SWITCHES | {"cross_attention_norm": True, "share_ff": False},
        flags=frozenset(
            {"apply_gated_attention", "cross_attention_adaln", "ff_bias", "use_keyframes_abs_pos_embedding"}
        ),
        sizes=_SIZES,
        audio_sizes=frozenset(
            {
                "audio_num_attention_heads",
                "audio_attention_head_dim",
                "audio_out_channels",
                "audio_cross_attention_dim",
                "audio_positional_embedding_max_pos",
                "av_ca_timestep_scale_multiplier",
            }
        ),
    ),
    # LTX-Video files say nothing of their rotary grid; the values are those that the class computes anyway.
    VIDEO_CLASS: Family(
        required=_SWITCHES,
        optional=_OPTIONAL_SWITCHES
        | {"frequencies_precision": "float32", "rope_type": "interleaved", "use_middle_indices_grid": False},
        flags=frozenset(),
        sizes=_SIZES,
        audio_sizes=frozenset(),
    ),
}
# All four or none: with them, text arrives at the width of the stream.
_TEXT_PROJECTION: dict[str, Any] = {
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
}
# Of no effect on the denoiser: training, the VAE's causality (it is in the positions), the text connectors.
_UNUSED = {
    "_class_name",
    "_diffusers_version",
    "audio_in_channels",
    "causal_temporal_positioning",
    "dropout",
    "norm_num_groups",
    "num_embeds_ada_norm",
    "text_encoder_norm_type",
    "use_embeddings_connector",
    "audio_connector_attention_head_dim",
    "audio_connector_num_attention_heads",
    "connector_apply_gated_attention",
    "connector_attention_head_dim",
    "connector_learnable_registers_std",
    "connector_num_attention_heads",
    "connector_num_layers",
    "connector_positional_embedding_max_pos",
    "connector_num_learnable_registers",
    "connector_norm_output",
}


def require_known(transformer: Mapping[str, Any], has_audio: bool, source: str) -> None:
    """Raise one CheckpointMismatch that lists missing keys, and keys and values that no model of ours has."""
    family = _FAMILIES.get(str(transformer.get("_class_name")))
    if family is None:
        raise mismatch(source, [f"_class_name={transformer.get('_class_name')!r}, which must be one of {[*_FAMILIES]}"])
    needed = family.sizes | family.required.keys() | (family.audio_sizes if has_audio else frozenset())
    projection = _TEXT_PROJECTION if text_arrives_projected(transformer) else {}
    values = family.required | family.optional | projection
    known = values.keys() | family.sizes | family.audio_sizes | _UNUSED
    missing = sorted((needed | projection.keys()) - transformer.keys())
    unsupported = sorted(
        f"{key}={value!r}"
        for key, value in transformer.items()
        if (not isinstance(value, bool) if key in family.flags else key not in known)
        or (key in values and value != values[key])
    )
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"not supported: {', '.join(unsupported)}"] if unsupported else []
    if parts:
        raise mismatch(source, parts)


def text_arrives_projected(transformer: Mapping[str, Any]) -> bool:
    """If the denoiser has no text projection of its own."""
    return transformer.get("_class_name") == AUDIO_VIDEO_CLASS and not _TEXT_PROJECTION.keys().isdisjoint(transformer)


def mismatch(source: str, problems: list[str]) -> CheckpointMismatch:
    """The error for metadata that is not of a denoiser we have."""
    return CheckpointMismatch(
        f"{source}: section 'transformer' must describe an LTX-2 or LTX-Video denoiser, got {'; '.join(problems)}; "
        "use a published file"
    )


class Reader:
    """Reads typed values and collects what is wrong; what it returns counts only if there are no problems."""

    def __init__(self, transformer: Mapping[str, Any]) -> None:
        self.transformer = transformer
        self.problems: list[str] = []

    def positive(self, key: str, kind: type[Number], default: Number | None = None) -> Number:
        """A positive number; an absent key gives the default, if there is one."""
        if default is not None and key not in self.transformer:
            return default
        value = self.transformer[key]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value <= 0 or (kind is int and value != int(value)):
            self.problems.append(f"{key}={value!r} instead of a positive {'whole ' if kind is int else ''}number")
            return kind(1)
        return kind(value)

    def extents(self, key: str, num_axes: int) -> tuple[int, ...]:
        """One positive whole number an axis."""
        value = self.transformer[key]
        whole = isinstance(value, list) and all(isinstance(extent, int) and extent > 0 for extent in value)
        if not whole or len(value) != num_axes:
            self.problems.append(f"{key}={value!r} instead of {num_axes} positive whole numbers")
            return (1,) * num_axes
        return tuple(value)

    def require_equal(self, key: str, expected: int, meaning: str) -> None:
        """That a key repeats what others say."""
        if self.transformer[key] != expected:
            self.problems.append(f"{key}={self.transformer[key]!r} instead of {meaning} = {expected}")
