"""Text connectors of LTX-2.0 and LTX-2.3: all hidden states of the text encoder to what the denoiser attends to.

The encoder itself is in `text_encoder.py`. LTX-Video has no connectors: its denoiser attends to the encoder's states.

Shapes: B batch, S text tokens, D width, L hidden states of the encoder.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from torch import nn

from pipeline.engine.components.blueprint import Blueprint, section
from pipeline.engine.components.text import NUM_REGISTERS, TextContext, TextStates
from pipeline.errors import CheckpointMismatch
from pipeline.model.checkpoint import DENOISER_PREFIX, CheckpointFile

_PROJECTION = "text_embedding_projection."
_SHARED_PROJECTION = _PROJECTION + "aggregate_embed.weight"
_VIDEO_PROJECTION = _PROJECTION + "video_aggregate_embed.weight"
# A file of the second kind has all four, with the values of the one model there is.
_SECOND_KIND: dict[str, bool] = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


class TextConnectors:
    """Hidden states of the text encoder to the contexts of both streams; LTX-Video has no module and one stream."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module

    def connect(self, states: TextStates) -> TextContext:
        """Contexts (B,S,D). A module expects left padding, as `TextEncoder` does, and S a multiple of 128."""
        if self._module is None:
            return TextContext(states.hidden_BSDL[..., -1], None, states.mask_BS)
        weight = next(self._module.parameters())
        hidden = states.hidden_BSDL.to(weight.device, weight.dtype)
        mask = states.mask_BS.to(weight.device)
        video, audio, _ = self._module(hidden, mask, padding_side="left")
        return TextContext(video, audio)


def load_text_connectors(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> TextConnectors:
    """Text projection and both connectors of a single-file checkpoint, of whichever kind its metadata says, if any."""
    transformer = section(checkpoint.config, "transformer")
    if not has_text_connectors(transformer):
        return TextConnectors(None)
    name = _VIDEO_PROJECTION if _is_second_kind(transformer) else _SHARED_PROJECTION
    projection = checkpoint.tensor_specs().get(name)
    if projection is None:
        raise CheckpointMismatch(f"the checkpoint lacks {name}")
    num_text_states = projection.shape[1] // transformer["caption_channels"]
    plan = text_connectors_blueprint(transformer, num_text_states=num_text_states)
    return TextConnectors(plan.fill(checkpoint, device=device, dtype=dtype, what="the text connectors"))


def has_text_connectors(transformer: dict[str, Any]) -> bool:
    """If a model with this `transformer` section has connectors: LTX-2 does, LTX-Video does not."""
    return bool(transformer.get("use_embeddings_connector", False))


def text_connectors_blueprint(transformer: dict[str, Any], *, num_text_states: int) -> Blueprint:
    """Connectors for a text encoder with `num_text_states` hidden states (its layers plus the embedding)."""
    second = _is_second_kind(transformer)
    video = {
        key: transformer[f"connector_{key}"] for key in ("num_attention_heads", "attention_head_dim", "num_layers")
    }
    audio = {key: transformer.get(f"audio_connector_{key}", value) for key, value in video.items()}
    common = {
        "num_learnable_registers": NUM_REGISTERS,
        "gated_attn": transformer.get("connector_apply_gated_attention", False),
    }
    # What the projection gives is what the connectors take: in the second kind each stream has its own.
    widths = {
        f"{stream}_hidden_dim": each["num_attention_heads"] * each["attention_head_dim"]
        for stream, each in (("video", video), ("audio", audio))
    }
    with torch.device("meta"):
        module = LTX2TextConnectors(
            caption_channels=transformer["caption_channels"],
            text_proj_in_factor=num_text_states,
            **{_argument("video", key): value for key, value in (video | common).items()},
            **{_argument("audio", key): value for key, value in (audio | common).items()},
            connector_rope_base_seq_len=transformer["connector_positional_embedding_max_pos"][0],
            rope_theta=transformer["positional_embedding_theta"],
            rope_double_precision=transformer["frequencies_precision"] == "float64",
            rope_type=transformer["rope_type"],
            per_modality_projections=second,
            proj_bias=second,
            **widths,
        )
    return Blueprint(module, {_name_on_disk(name): name for name in module.state_dict()})


def _is_second_kind(transformer: dict[str, Any]) -> bool:
    found = {key: transformer[key] for key in _SECOND_KIND if key in transformer}
    if found and found != _SECOND_KIND:
        raise CheckpointMismatch(
            f"the checkpoint's text projection must have all of {_SECOND_KIND} or none of these keys, got {found}; "
            "use a published model"
        )
    return bool(found)


def _argument(stream: str, key: str) -> str:
    return f"{stream}_gated_attn" if key == "gated_attn" else f"{stream}_connector_{key}"


def _name_on_disk(name: str) -> str:
    if match := re.fullmatch(r"((?:video_|audio_)?)text_proj_in\.(.*)", name):
        return f"{_PROJECTION}{match[1]}aggregate_embed.{match[2]}"
    name = name.replace("_connector.", "_embeddings_connector.", 1).replace(
        "transformer_blocks.", "transformer_1d_blocks."
    )
    return DENOISER_PREFIX + name.replace("norm_q.", "q_norm.").replace("norm_k.", "k_norm.")
