"""Which tensors of a single file belong to which part, so that a tensor that nobody owns is found.

The denoiser accounts for its own (`pipeline/model/checkpoint.py`).
"""

from __future__ import annotations

from typing import Any

from pipeline.engine.components.audio_vae import audio_decoder_blueprint, audio_encoder_blueprint, audio_sizes
from pipeline.engine.components.blueprint import Blueprint, section, statistics_blueprint
from pipeline.engine.components.connectors import has_text_connectors, text_connectors_blueprint
from pipeline.engine.components.video_vae import video_decoder_blueprint, video_encoder_blueprint
from pipeline.engine.components.vocoder import vocoder_blueprint


def part_blueprints(config: dict[str, Any], *, num_text_states: int) -> list[Blueprint]:
    """Every part but the denoiser of a single file with this metadata; LTX-Video has neither connectors nor sound."""
    vae = section(config, "vae")
    plans = [
        video_encoder_blueprint(vae),
        video_decoder_blueprint(vae),
        statistics_blueprint("vae", num_channels=vae["latent_channels"]),
    ]
    transformer = section(config, "transformer")
    if has_text_connectors(transformer):
        plans.append(text_connectors_blueprint(transformer, num_text_states=num_text_states))
    if "audio_vae" in config or "vocoder" in config:
        audio_vae = section(config, "audio_vae")
        sizes = audio_sizes(audio_vae)
        plans += [
            audio_encoder_blueprint(audio_vae),
            audio_decoder_blueprint(audio_vae),
            statistics_blueprint("audio_vae", num_channels=sizes["z_channels"] * sizes["mel_bins"] // 4),
            vocoder_blueprint(section(config, "vocoder"), mel_bins=sizes["mel_bins"]),
        ]
    return plans


def tensors_of_parts(config: dict[str, Any]) -> set[str]:
    """Names on disk of every tensor in a single file that a part of this package reads."""
    return {name for plan in part_blueprints(config, num_text_states=1) for name in plan.names}
