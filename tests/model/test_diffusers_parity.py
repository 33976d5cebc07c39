"""Equality with an independent implementation, diffusers', on fresh random weights and sizes at every run.

Where timesteps differ from token to token, diffusers offers the two older rules for the audio-video attention only.
"""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.bench.peers import published_name
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.hparams import ExchangeTimesteps
from pipeline.model.streams import DistinctTimesteps, Perturbation, TokenStream

BOUND = 1e-4


@pytest.fixture
def rng() -> torch.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201  (pytest shows it when a test fails)
    return torch.Generator().manual_seed(seed)


def pick(rng: torch.Generator, *options: int) -> int:
    return options[int(torch.randint(len(options), (), generator=rng))]


# What a version's `transformer` section has over that of LTX-2.0.
VERSIONS: dict[str, dict] = {
    "2.0": {},
    "2.3": {
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "caption_proj_input_norm": False,
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
    },
}
VERSIONS["2.5"] = VERSIONS["2.3"] | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}


def random_section(rng: torch.Generator, version: str = "2.0") -> dict:
    """A `transformer` section of random small size, in the published spelling."""
    heads, head_dim, audio_head_dim = pick(rng, 1, 2, 4), pick(rng, 8, 16, 24), pick(rng, 4, 8, 12)
    return {
        "_class_name": "AVTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": head_dim,
        "audio_attention_head_dim": audio_head_dim,
        "audio_cross_attention_dim": heads * audio_head_dim,
        "audio_in_channels": pick(rng, 8, 20),
        "audio_num_attention_heads": heads,
        "audio_out_channels": pick(rng, 8, 20),
        "audio_positional_embedding_max_pos": [20],
        "av_ca_timestep_scale_multiplier": pick(rng, 1, 1000),
        "av_cross_ada_norm": True,
        "caption_channels": pick(rng, 12, 40),
        "cross_attention_dim": heads * head_dim,
        "frequencies_precision": "float64",
        "in_channels": pick(rng, 8, 16),
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_layers": pick(rng, 1, 2, 3),
        "out_channels": pick(rng, 8, 16),
        "positional_embedding_max_pos": [20, 2048, 2048],
        "positional_embedding_theta": 10000.0,
        "positional_embedding_type": "rope",
        "qk_norm": "rms_norm",
        "rope_type": "split",
        "standardization_norm": "rms_norm",
        "timestep_scale_multiplier": 1000,
        "use_audio_video_cross_attention": True,
        "use_middle_indices_grid": True,
    } | VERSIONS[version]


def random_ltx_video_section(rng: torch.Generator) -> dict:
    heads, head_dim = pick(rng, 1, 2, 4), pick(rng, 8, 16, 24)
    return {
        "_class_name": "Transformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": head_dim,
        "caption_channels": pick(rng, 12, 40),
        "cross_attention_dim": heads * head_dim,
        "in_channels": pick(rng, 8, 16),
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_layers": pick(rng, 1, 2, 3),
        "out_channels": pick(rng, 8, 16),
        "positional_embedding_max_pos": [20, 2048, 2048],
        "positional_embedding_theta": 10000.0,
        "positional_embedding_type": "rope",
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "timestep_scale_multiplier": 1000,
    }


def with_random_weights(kind: type, section: dict, rng: torch.Generator, **options: object) -> Any:
    theirs = inspect.signature(kind.__init__).parameters
    same = {key: value for key, value in section.items() if key in theirs and key != "qk_norm"}
    model = kind(**(same | options))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        is_norm = "norm_q" in name or "norm_k" in name
        scale = 0.3 if parameter.ndim == 1 or "table" in name else parameter.shape[-1] ** -0.5
        parameter.data = noise * scale + (1.0 if is_norm else 0.0)
    return model.eval()


def their_model(section: dict, rng: torch.Generator) -> LTX2VideoTransformer3DModel:
    newer = "apply_gated_attention" in section
    return with_random_weights(
        LTX2VideoTransformer3DModel,
        section,
        rng,
        cross_attn_timestep_scale_multiplier=section["av_ca_timestep_scale_multiplier"],
        rope_double_precision=True,
        perturbed_attn=True,
        use_prompt_embeddings=not newer,
        **dict.fromkeys(("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod"), newer),
    )


def our_model(
    theirs: torch.nn.Module, section: dict, folder: Path, rule: ExchangeTimesteps = "1.2.0"
) -> AudioVideoDenoiser:
    """Theirs, written as a published file and loaded."""
    path = folder / "random.safetensors"
    stored = {published_name(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(stored, path, metadata={"config": json.dumps({"transformer": section})})
    return load_denoiser(CheckpointFile(path), reference_ops(), "cpu", exchange_timesteps=rule)


def random_stream(section: dict, prefix: str, num_axes: int, num_tokens: int, rng: torch.Generator) -> TokenStream:
    batch, num_text = 2, 7
    start = (
        torch.rand(batch, num_axes, num_tokens, generator=rng) * torch.tensor([8.0, 1500.0, 1500.0])[:num_axes, None]
    )
    keep = torch.rand(batch, num_text, generator=rng) < 0.7
    keep[:, 0] = True
    sigma_B = torch.rand(batch, generator=rng)
    width = section[f"{prefix}num_attention_heads"] * section[f"{prefix}attention_head_dim"]
    text_channels = width if "apply_gated_attention" in section else section["caption_channels"]
    return TokenStream(
        tokens_BTC=torch.randn(batch, num_tokens, section[f"{prefix}in_channels"], generator=rng),
        timesteps=DistinctTimesteps.uniform(sigma_B),
        sigma_B=sigma_B,
        positions_BAT2=torch.stack((start, start + 0.25), dim=-1),
        text_BSD=torch.randn(batch, num_text, text_channels, generator=rng),
        text_mask_BS=keep.long(),
        keyframes_mask_BT=(torch.rand(batch, num_tokens, generator=rng) < 0.4).float(),
    )


def their_velocities(
    model: LTX2VideoTransformer3DModel, video: TokenStream, audio: TokenStream, **guidance: object
) -> tuple[Tensor, Tensor]:
    return model(
        hidden_states=video.tokens_BTC,
        audio_hidden_states=audio.tokens_BTC,
        encoder_hidden_states=video.text_BSD,
        audio_encoder_hidden_states=audio.text_BSD,
        timestep=video.timesteps.per_token(video.tokens_BTC.shape[1]) * 1000,
        audio_timestep=audio.timesteps.per_token(audio.tokens_BTC.shape[1]) * 1000,
        sigma=video.sigma_B * 1000,
        audio_sigma=audio.sigma_B * 1000,
        encoder_attention_mask=video.text_mask_BS,
        audio_encoder_attention_mask=audio.text_mask_BS,
        video_coords=video.positions_BAT2,
        audio_coords=audio.positions_BAT2,
        video_keyframes_mask=video.keyframes_mask_BT[..., None]
        if model.config.use_keyframes_abs_pos_embedding
        else None,
        return_dict=False,
        **guidance,
    )


def assert_near(velocities: Iterable[Tensor | None], expected: Iterable[Tensor]) -> None:
    for got, want in zip(velocities, expected, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error <= BOUND


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("guidance", ["plain", "skipped_self_attention", "isolated"])
def test_velocities_equal_those_of_diffusers_on_random_weights(
    guidance: str, version: str, rng: torch.Generator, tmp_path: Path
) -> None:
    section = random_section(rng, version)
    theirs = their_model(section, rng)
    ours = our_model(theirs, section, tmp_path)

    # One noise level for both streams: only then do all gate rules agree.
    video = random_stream(section, "", 3, pick(rng, 1, 5, 12), rng)
    audio = random_stream(section, "audio_", 1, pick(rng, 1, 3, 8), rng)
    audio = TokenStream(**{**vars(audio), "sigma_B": video.sigma_B, "timesteps": video.timesteps})
    last = section["num_layers"] - 1
    their_guidance, our_guidance = {
        "plain": ({}, None),
        "skipped_self_attention": (
            {"spatio_temporal_guidance_blocks": [last], "perturbation_mask": torch.tensor([1.0, 0.0])},
            (Perturbation(), Perturbation(frozenset({last}), frozenset({last}))),
        ),
        "isolated": ({"isolate_modalities": True}, (Perturbation(isolate_streams=True),) * 2),
    }[guidance]

    assert_near(
        ours(video, audio, perturbations=our_guidance), their_velocities(theirs, video, audio, **their_guidance)
    )


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize(("rule", "use_cross_timestep"), [("1.0.0", True), ("first", False)])
def test_trap_01_older_rules_equal_those_of_diffusers_where_every_token_has_its_own_timestep(
    rule: ExchangeTimesteps, use_cross_timestep: bool, version: str, rng: torch.Generator, tmp_path: Path
) -> None:
    section = random_section(rng, version) | {"av_ca_timestep_scale_multiplier": 1000}
    theirs = their_model(section, rng)
    streams = []
    for prefix, num_axes, num_tokens in (("", 3, 12), ("audio_", 1, 8)):
        stream = random_stream(section, prefix, num_axes, num_tokens, rng)
        kept = (torch.rand(2, num_tokens, generator=rng) * 3).round() / 3
        streams.append(replace(stream, timesteps=DistinctTimesteps.from_tokens(kept).scaled(stream.sigma_B)))
    expected = their_velocities(theirs, *streams, use_cross_timestep=use_cross_timestep)
    assert_near(our_model(theirs, section, tmp_path, rule)(*streams), expected)
    for other in {"1.2.0", "1.0.0", "first"} - {rule}:
        velocities = our_model(theirs, section, tmp_path, other)(*streams)
        assert max((a - b).abs().max() for a, b in zip(velocities, expected, strict=True)) > 10 * BOUND


def test_ltx_video_equals_that_of_diffusers_on_random_weights(rng: torch.Generator, tmp_path: Path) -> None:
    section = random_ltx_video_section(rng)
    theirs = with_random_weights(LTXVideoTransformer3DModel, section, rng)
    video = random_stream(section, "", 3, 12, rng)
    kept = (torch.rand(2, 12, generator=rng) * 3).round() / 3
    video = replace(video, timesteps=DistinctTimesteps.from_tokens(kept).scaled(video.sigma_B))
    (expected,) = theirs(
        hidden_states=video.tokens_BTC,
        encoder_hidden_states=video.text_BSD,
        timestep=video.timesteps.per_token(12) * 1000,
        encoder_attention_mask=video.text_mask_BS,
        video_coords=video.positions_BAT2[..., 0],
        return_dict=False,
    )
    velocity, _ = our_model(theirs, section, tmp_path)(video, None)
    assert_near([velocity], [expected])
