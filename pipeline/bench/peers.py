"""Others' denoisers on our weights: diffusers', as its pipelines call it, eager and compiled block by block.

Their tensors are ours under their names, so their velocities must be ours. The only module here that names diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from torch import nn

from pipeline.bench.tiers import Built, Case, Contestant, Step, Velocities, Weights
from pipeline.model.checkpoint import DENOISER_PREFIX, name_on_disk, set_tensor
from pipeline.model.hparams import DenoiserHparams

# Theirs in parts of names -> the published files' own; the first that fits counts.
_PUBLISHED = {
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "time_embed": "adaln_single",
    "proj_in": "patchify_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


def _build(weights: Weights, *, compiled: bool) -> Built:
    model = filled(weights)
    if compiled:
        # As diffusers documents it. A new shape is compiled anew: sizes left open would cost speed.
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return Built(model, partial(bound, model))


def filled(weights: Weights, kind: Any = None) -> Any:
    """Their denoiser with our tensors; `kind` is somebody's own class of it, if it is not diffusers'."""
    model = on_meta(weights.section, weights.hparams, kind)
    ours = {name_on_disk(name): tensor.data for name, tensor in weights.plain.named_parameters()}
    for name in list(model.state_dict()):
        set_tensor(model, name, ours[published_name(name)])
    return model.eval().requires_grad_(False)


def on_meta(section: Mapping[str, Any], hparams: DenoiserHparams, kind: Any = None) -> Any:
    """Their denoiser of a `transformer` section, with shapes only; `kind` as for `filled`."""
    is_ltx2 = hparams.family == "ltx2"
    kind = kind or (LTX2VideoTransformer3DModel if is_ltx2 else LTXVideoTransformer3DModel)
    known = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in section.items() if name in known and name != "qk_norm"}
    if is_ltx2:
        gated = dict.fromkeys(("gated_attn", "audio_gated_attn"), hparams.gated_attention)
        modulated = dict.fromkeys(("cross_attn_mod", "audio_cross_attn_mod"), hparams.text_modulation)
        options |= (
            gated
            | modulated
            | {
                "cross_attn_timestep_scale_multiplier": section["av_ca_timestep_scale_multiplier"],
                "use_prompt_embeddings": hparams.text_channels is not None,
            }
        )
    with torch.device("meta"):
        return kind(**options)


def published_name(name: str) -> str:
    """Where the published files keep their tensor of this name."""
    for theirs, published in _PUBLISHED.items():
        if theirs in name:
            return DENOISER_PREFIX + name.replace(theirs, published)
    return DENOISER_PREFIX + name


def bound(model: nn.Module, case: Case) -> Step:
    """A step as their pipelines for text alone call it: one timestep a sample, positions made beforehand."""
    video, audio, timestep = case.video, case.audio, case.video.sigma_B * 1000
    given: dict[str, Any] = {
        "hidden_states": video.tokens_BTC, "encoder_hidden_states": video.text_BSD, "timestep": timestep,
        "num_frames": case.shape.num_frames, "height": case.shape.height, "width": case.shape.width,
        "encoder_attention_mask": None, "return_dict": False,
    }  # fmt: skip
    if audio is None:
        # Their class for LTX-Video takes where a token starts, ours both of its ends.
        given["video_coords"] = video.positions_BAT2[..., 0]
        return lambda: (model(**given)[0], None)
    given |= {
        "audio_hidden_states": audio.tokens_BTC, "audio_encoder_hidden_states": audio.text_BSD,
        "video_coords": video.positions_BAT2, "audio_coords": audio.positions_BAT2, "fps": case.shape.fps,
        "audio_num_frames": case.shape.num_audio_latents, "sigma": timestep, "use_cross_timestep": True,
    }  # fmt: skip

    def step() -> Velocities:
        velocities: Velocities = model(**given)
        return velocities

    return step


PEERS = (
    Contestant("diffusers", False, partial(_build, compiled=False)),
    Contestant("diffusers_compiled", False, partial(_build, compiled=True)),
)
