"""Third-party networks behind small types of ours: text encoder, connectors, decoders, vocoder, upsampler.

The only file that names diffusers or transformers, so that an upgrade touches one place. Every part is built on
the meta device from the checkpoint's own metadata and filled strictly under its published names. The denoiser is
ours and lives in `pipeline/model`; what the parts are used for is in `engine.py`.

Shapes: B batch, S text tokens, D width, L hidden states of the encoder, C channels, F frames, H height, W width,
T time, M mel or latent bins, N samples.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoDecoder3d
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import LTX2AudioDecoder
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from pipeline.engine.latents import ChannelStatistics
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import DENOISER_PREFIX, CheckpointFile, fill_module

# Published single files hold 128 registers whatever `connector_num_learnable_registers` says.
NUM_REGISTERS = 128
LATENT_BIN_DIVISOR = 4

_UPSAMPLE_TYPES = {"compress_all": "spatiotemporal", "compress_space": "spatial", "compress_time": "temporal"}


@dataclass(frozen=True)
class Blueprint:
    """A network on the meta device and, for each name on disk, the name of the tensor it fills."""

    module: nn.Module
    names: dict[str, str]

    def fill(self, checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None, what: str) -> Any:
        """The network with its weights, ready for inference; CheckpointMismatch lists every difference."""
        fill_module(self.module, checkpoint, self.names, device=device, dtype=dtype, what=what)
        return self.module.eval().requires_grad_(False)


@dataclass(frozen=True)
class TextStates:
    """What the text encoder says of a prompt: every hidden state, and which tokens are real (1) or padding (0)."""

    hidden_BSDL: Tensor
    mask_BS: Tensor


@dataclass(frozen=True)
class TextContext:
    """What the denoiser attends to. No mask: no padding is left. No audio: a model without sound."""

    video_BSD: Tensor
    audio_BSD: Tensor | None
    mask_BS: Tensor | None = None


class TextEncoder:
    """Gemma 3 from a folder: prompts to the stack of all hidden states."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_tokens: int, device: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._device = device

    def encode(self, prompts: list[str]) -> TextStates:
        """Hidden states (B,S,D,L) of the embedding and every layer; prompts longer than `max_tokens` are cut."""
        tokens = self._tokenizer(
            [prompt.strip() for prompt in prompts],
            padding="max_length",
            max_length=self._max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        states = self._model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return TextStates(torch.stack(states, dim=-1), tokens.attention_mask)


class TextConnectors:
    """Hidden states of the text encoder to the contexts of both streams."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def connect(self, states: TextStates) -> TextContext:
        """Contexts (B,S,D). Expects left padding, as `TextEncoder` does, and S a multiple of 128."""
        weight = next(self._module.parameters())
        hidden = states.hidden_BSDL.to(weight.device, weight.dtype)
        mask = states.mask_BS.to(weight.device)
        video, audio, _ = self._module(hidden, mask, padding_side="left")
        return TextContext(video, audio)


class VideoDecoder:
    """Normalised video latents (B,C,F,H,W) to pixels (B,3,8F-7,32H,32W), roughly in [-1,1], not clamped."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics) -> None:
        self._module = module
        self.statistics = statistics

    def decode(self, latent_BCFHW: Tensor) -> Tensor:
        latent = self.statistics.unnormalise(latent_BCFHW.float(), dim=1)
        return self._module(latent.to(next(self._module.parameters()).dtype))


class AudioDecoder:
    """Normalised audio latents (B,C,T,M) to a log-mel spectrogram (B,channels,4T-3,mel bins)."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics, *, num_latent_bins: int) -> None:
        self._module = module
        self._statistics = statistics
        self.num_latent_bins = num_latent_bins

    def decode(self, latent_BCTM: Tensor) -> Tensor:
        # The statistics belong to the flattened (channel, bin) vector, not to channels alone.
        flat_BTC = latent_BCTM.float().permute(0, 2, 1, 3).flatten(2)
        latent = self._statistics.unnormalise(flat_BTC, dim=2)
        latent = latent.unflatten(2, (-1, self.num_latent_bins)).permute(0, 2, 1, 3)
        return self._module(latent.to(next(self._module.parameters()).dtype))


class Vocoder:
    """Log-mel spectrogram (B,channels,T,M) to a waveform (B,channels,N) in [-1,1], always in float32."""

    def __init__(self, module: nn.Module, *, sample_rate_hz: int) -> None:
        self._module = module
        self.sample_rate_hz = sample_rate_hz

    def synthesise(self, mel_BCTM: Tensor) -> Tensor:
        return self._module(mel_BCTM.float())


class LatentUpsampler:
    """Normalised video latents (B,C,F,H,W) to normalised latents of twice the height and width."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics) -> None:
        self._module = module
        self._statistics = statistics

    def upsample(self, latent_BCFHW: Tensor) -> Tensor:
        latent = self._statistics.unnormalise(latent_BCFHW.float(), dim=1)
        latent = self._module(latent.to(next(self._module.parameters()).dtype)).float()
        return self._statistics.normalise(latent, dim=1)


def load_text_encoder(folder: Path, *, max_tokens: int, device: str, dtype: torch.dtype | None) -> TextEncoder:
    """The text encoder of `folder`; `dtype` None keeps the stored one. UsageError if the folder cannot be used."""
    if max_tokens % NUM_REGISTERS:
        raise UsageError(f"model.size.text_tokens must be a multiple of {NUM_REGISTERS}, got {max_tokens}; use 1024")
    # Without tokenizer.json the library makes up an empty vocabulary and says nothing.
    needed = ("config.json", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise UsageError(f"text encoder folder {folder} lacks {', '.join(missing)}; stage the model's files again")
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        loaded: Any = Gemma3ForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=dtype or "auto", output_loading_info=True
        )
    except Exception as error:  # whatever its readers of JSON, tokenizers and tensors raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"text encoder folder {folder} cannot be read as Gemma 3: {reason}") from error
    model, report = loaded
    if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise CheckpointMismatch(f"text encoder folder {folder} lacks {len(lacking)} tensors, such as {lacking[0]}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    language_model = model.model.language_model.eval().requires_grad_(False).to(device)
    return TextEncoder(language_model, tokenizer, max_tokens=max_tokens, device=device)


def load_text_connectors(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> TextConnectors:
    """Text projection and both connectors of a single-file checkpoint."""
    transformer = section(checkpoint.config, "transformer")
    projection = checkpoint.tensor_specs().get("text_embedding_projection.aggregate_embed.weight")
    if projection is None:
        raise CheckpointMismatch("the checkpoint lacks text_embedding_projection.aggregate_embed.weight")
    plan = text_connectors_blueprint(transformer, num_text_states=projection.shape[1] // projection.shape[0])
    return TextConnectors(plan.fill(checkpoint, device=device, dtype=dtype, what="the text connectors"))


def load_video_decoder(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> VideoDecoder:
    """Video decoder of a single-file checkpoint, with its channel statistics in float32."""
    vae = section(checkpoint.config, "vae")
    module = video_decoder_blueprint(vae).fill(checkpoint, device=device, dtype=dtype, what="the video decoder")
    plan = statistics_blueprint("vae", num_channels=vae["latent_channels"])
    return VideoDecoder(module, plan.fill(checkpoint, device=device, dtype=torch.float32, what="video statistics"))


def load_audio_decoder(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> AudioDecoder:
    """Audio decoder of a single-file checkpoint, with its channel statistics in float32."""
    plan, sizes = audio_decoder_blueprint(section(checkpoint.config, "audio_vae")), _audio_sizes(checkpoint.config)
    module = plan.fill(checkpoint, device=device, dtype=dtype, what="the audio decoder")
    num_bins = sizes["mel_bins"] // LATENT_BIN_DIVISOR
    plan = statistics_blueprint("audio_vae", num_channels=sizes["z_channels"] * num_bins)
    statistics = plan.fill(checkpoint, device=device, dtype=torch.float32, what="audio statistics")
    return AudioDecoder(module, statistics, num_latent_bins=num_bins)


def load_vocoder(checkpoint: CheckpointFile, *, device: str) -> Vocoder:
    """Vocoder of a single-file checkpoint. Its rate is the mel rate times its upsampling (24 kHz as published)."""
    vocoder = section(checkpoint.config, "vocoder")
    plan = vocoder_blueprint(vocoder, mel_bins=_audio_sizes(checkpoint.config)["mel_bins"])
    module = plan.fill(checkpoint, device=device, dtype=torch.float32, what="the vocoder")
    mel = section(checkpoint.config, "audio_vae")["preprocessing"]
    rate = mel["audio"]["sampling_rate"] * math.prod(vocoder["upsample_rates"]) // mel["stft"]["hop_length"]
    return Vocoder(module, sample_rate_hz=rate)


def load_latent_upsampler(
    file: CheckpointFile, statistics: ChannelStatistics, *, device: str, dtype: torch.dtype | None
) -> LatentUpsampler:
    """Spatial x2 upsampler from its own file; UsageError if the file is of another kind or of another latent."""
    plan = latent_upsampler_blueprint(file.config)
    channels, expected = file.config["in_channels"], statistics.mean.numel()
    if channels != expected:
        raise UsageError(f"the spatial upscaler works on {channels} latent channels, the model has {expected}")
    unknown = sorted(set(file.tensor_specs()) - set(plan.names))
    if unknown:
        raise CheckpointMismatch(f"the spatial upscaler's file holds unknown tensors: {', '.join(unknown)}")
    return LatentUpsampler(plan.fill(file, device=device, dtype=dtype, what="the spatial upscaler"), statistics)


def tensors_of_parts(config: dict[str, Any]) -> set[str]:
    """Names on disk of every tensor in a single file that a part of this module reads."""
    plans = (
        text_connectors_blueprint(section(config, "transformer"), num_text_states=1),
        video_decoder_blueprint(section(config, "vae")),
        statistics_blueprint("vae", num_channels=1),
        audio_decoder_blueprint(section(config, "audio_vae")),
        statistics_blueprint("audio_vae", num_channels=1),
        vocoder_blueprint(section(config, "vocoder"), mel_bins=_audio_sizes(config)["mel_bins"]),
    )
    return {name for plan in plans for name in plan.names}


def text_connectors_blueprint(transformer: dict[str, Any], *, num_text_states: int) -> Blueprint:
    """Connectors for a text encoder with `num_text_states` hidden states (its layers plus the embedding)."""
    each = {key: transformer[f"connector_{key}"] for key in ("num_attention_heads", "attention_head_dim", "num_layers")}
    each["num_learnable_registers"] = NUM_REGISTERS
    with torch.device("meta"):
        module = LTX2TextConnectors(
            caption_channels=transformer["caption_channels"],
            text_proj_in_factor=num_text_states,
            **{f"{stream}_connector_{key}": value for stream in ("video", "audio") for key, value in each.items()},
            connector_rope_base_seq_len=transformer["connector_positional_embedding_max_pos"][0],
            rope_theta=transformer["positional_embedding_theta"],
            rope_double_precision=transformer["frequencies_precision"] == "float64",
            rope_type=transformer["rope_type"],
        )
    names = {"text_embedding_projection.aggregate_embed.weight": "text_proj_in.weight"}
    for name in module.state_dict():
        if match := re.fullmatch(r"(video|audio)_connector\.(.*)", name):
            rest = match[2].replace("transformer_blocks.", "transformer_1d_blocks.")
            rest = rest.replace("norm_q.", "q_norm.").replace("norm_k.", "k_norm.")
            names[f"{DENOISER_PREFIX}{match[1]}_embeddings_connector.{rest}"] = name
    return Blueprint(module, names)


def video_decoder_blueprint(vae: dict[str, Any]) -> Blueprint:
    """Decoder of the `vae` section: residual blocks alternating with upsamplers, residual blocks at both ends."""
    blocks, ups = vae["decoder_blocks"], vae["decoder_blocks"][1::2]
    alternating = len(blocks) % 2 == 1 and all(kind == "res_x" for kind, _ in blocks[::2])
    if not alternating or any(kind not in _UPSAMPLE_TYPES for kind, _ in ups) or vae.get("timestep_conditioning"):
        raise UsageError(f"the checkpoint's video decoder is of a kind not supported here: {blocks}")
    multipliers = [block["multiplier"] for _, block in ups]
    widths = [vae["decoder_base_channels"] * math.prod(multipliers[i:]) for i in range(len(ups))]
    # The library wants most lists from the output end to the input end, but upsample_type in running order.
    with torch.device("meta"):
        module = LTX2VideoDecoder3d(
            in_channels=vae["latent_channels"],
            out_channels=vae["out_channels"],
            block_out_channels=tuple(reversed(widths)),
            spatio_temporal_scaling=(True,) * len(ups),
            layers_per_block=tuple(block["num_layers"] for _, block in reversed(blocks[::2])),
            upsample_type=tuple(_UPSAMPLE_TYPES[kind] for kind, _ in ups),
            patch_size=vae["patch_size"],
            is_causal=vae["causal_decoder"],
            inject_noise=tuple(block.get("inject_noise", False) for _, block in reversed(blocks[::2])),
            upsample_residual=tuple(block.get("residual", False) for _, block in reversed(ups)),
            upsample_factor=tuple(reversed(multipliers)),
            # One key for both directions wins over the pair; without any, decoders of this family reflect.
            spatial_padding_mode=vae.get("spatial_padding_mode", vae.get("decoder_spatial_padding_mode", "reflect")),
        )
    return Blueprint(module, {f"vae.decoder.{_video_name_on_disk(name)}": name for name in module.state_dict()})


def audio_decoder_blueprint(audio_vae: dict[str, Any]) -> Blueprint:
    """Decoder of the `audio_vae` section; names on disk are the library's."""
    dd = _Section(audio_vae["model"]["params"]["ddconfig"])
    with torch.device("meta"):
        module = LTX2AudioDecoder(
            base_channels=dd["ch"],
            output_channels=dd["out_ch"],
            num_res_blocks=dd["num_res_blocks"],
            attn_resolutions=tuple(dd["attn_resolutions"]),
            in_channels=dd["in_channels"],
            resolution=dd["resolution"],
            latent_channels=dd["z_channels"],
            ch_mult=tuple(dd["ch_mult"]),
            norm_type=dd["norm_type"],
            causality_axis=dd["causality_axis"],
            mid_block_add_attention=dd["mid_block_add_attention"],
            mel_bins=dd["mel_bins"],
        )
    return Blueprint(module, {f"audio_vae.decoder.{name}": name for name in module.state_dict()})


def vocoder_blueprint(vocoder: dict[str, Any], *, mel_bins: int) -> Blueprint:
    """Vocoder of the `vocoder` section (2.0: HiFi-GAN without bandwidth extension)."""
    if "bwe" in vocoder or vocoder.get("resblock") != "1":
        raise UsageError("the checkpoint's vocoder is of a kind not supported here; use an LTX-2.0 checkpoint")
    channels = 2 if vocoder["stereo"] else 1
    with torch.device("meta"):
        module = LTX2Vocoder(
            in_channels=channels * mel_bins,
            hidden_channels=vocoder["upsample_initial_channel"],
            out_channels=channels,
            upsample_kernel_sizes=vocoder["upsample_kernel_sizes"],
            upsample_factors=vocoder["upsample_rates"],
            resnet_kernel_sizes=vocoder["resblock_kernel_sizes"],
            resnet_dilations=vocoder["resblock_dilation_sizes"],
        )
    on_disk = {"conv_in": "conv_pre", "conv_out": "conv_post", "upsamplers": "ups", "resnets": "resblocks"}
    parts = [name.split(".", 1) for name in module.state_dict()]
    return Blueprint(module, {f"vocoder.{on_disk[head]}.{rest}": f"{head}.{rest}" for head, rest in parts})


def latent_upsampler_blueprint(config: dict[str, Any]) -> Blueprint:
    """Spatial x2 upsampler; `config` is the whole metadata of its file. UsageError for any other kind of file."""
    kind: dict[str, Any] = {"_class_name": "LatentUpsampler", "spatial_upsample": True, "temporal_upsample": False}
    kind["spatial_scale"] = 2.0
    config = _Section({"spatial_scale": 2.0, **config})
    wrong = [f"{key} is {config.get(key)!r}" for key, value in kind.items() if config.get(key) != value]
    if wrong:
        raise UsageError(f"the spatial upscaler must be a latent upsampler x2 in space, but {', '.join(wrong)}")
    with torch.device("meta"):
        module = LTX2LatentUpsamplerModel(
            in_channels=config["in_channels"],
            mid_channels=config["mid_channels"],
            num_blocks_per_stage=config["num_blocks_per_stage"],
            dims=config["dims"],
            use_rational_resampler=config.get("rational_resampler", False),
        )
    return Blueprint(module, {name: name for name in module.state_dict()})


def statistics_blueprint(prefix: str, *, num_channels: int) -> Blueprint:
    """Channel statistics of `vae` or `audio_vae`."""
    with torch.device("meta"):
        module = ChannelStatistics(num_channels)
    on_disk = f"{prefix}.per_channel_statistics."
    return Blueprint(module, {on_disk + "mean-of-means": "mean", on_disk + "std-of-means": "std"})


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """One section of the metadata's `config`; CheckpointMismatch if the file has none."""
    if name not in config:
        raise CheckpointMismatch(f"the checkpoint's metadata has no section {name!r}; use an LTX-2 single file")
    return _Section(config[name])


class _Section(dict[str, Any]):
    """A part of the metadata in which a missing key is the file's fault, not a bug."""

    def __missing__(self, key: str) -> Any:
        raise CheckpointMismatch(f"the checkpoint's metadata lacks {key!r} beside {sorted(self)[:4]}")


def _audio_sizes(config: dict[str, Any]) -> dict[str, Any]:
    return _Section(section(config, "audio_vae")["model"]["params"]["ddconfig"])


def _video_name_on_disk(name: str) -> str:
    # On disk all blocks are one list; the library splits it into a middle block and pairs of (upsampler, block).
    name = name.replace("mid_block.resnets.", "up_blocks.0.res_blocks.")
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
        return f"up_blocks.{2 * int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(.*)", name):
        return f"up_blocks.{2 * int(match[1]) + 2}.res_blocks.{match[2]}"
    return name
