"""Vocoders of LTX-2: a log-mel spectrogram to a waveform, at 24 kHz (2.0) or 48 kHz (2.3). Always in float32.

The 2.3 kind makes 16 kHz sound first and then extends its bandwidth. Where spectrograms come from: `audio_vae.py`.

Shapes: B batch, C channels, T time, M mel bins, N samples.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE, UpSample1d
from torch import Tensor, nn

from pipeline.engine.components.audio_vae import audio_sizes
from pipeline.engine.components.blueprint import Blueprint, Section, section
from pipeline.errors import UsageError
from pipeline.model.checkpoint import CheckpointFile

_NAMES_ON_DISK = {
    r"\bconv_in\.": "conv_pre.",
    r"\bconv_out\.": "conv_post.",
    r"\bact_out\.": "act_post.",
    r"\bupsamplers\.": "ups.",
    r"\bresnets\.": "resblocks.",
    r"\bdownsample\.filter": "downsample.lowpass.filter",
}


class Vocoder:
    """Log-mel spectrogram (B,channels,T,M) to a waveform (B,channels,N) in [-1,1], always in float32."""

    def __init__(self, module: nn.Module, *, sample_rate_hz: int) -> None:
        self._module = module
        self.sample_rate_hz = sample_rate_hz

    def synthesise(self, mel_BCTM: Tensor) -> Tensor:
        return self._module(mel_BCTM.float())


def load_vocoder(checkpoint: CheckpointFile, *, device: str) -> Vocoder:
    """Vocoder of a single-file checkpoint, of whichever kind its metadata describes."""
    audio_vae, vocoder = section(checkpoint.config, "audio_vae"), section(checkpoint.config, "vocoder")
    plan = vocoder_blueprint(vocoder, mel_bins=audio_sizes(audio_vae)["mel_bins"])
    module = plan.fill(checkpoint, device=device, dtype=torch.float32, what="the vocoder")
    return Vocoder(module, sample_rate_hz=waveform_rate_hz(audio_vae, vocoder))


def vocoder_blueprint(vocoder: dict[str, Any], *, mel_bins: int) -> Blueprint:
    """Vocoder of the `vocoder` section, which has two sections of its own if the bandwidth is extended."""
    if "bwe" in vocoder:
        module = _with_bandwidth_extension(Section(vocoder["vocoder"]), Section(vocoder["bwe"]), mel_bins)
    else:
        with torch.device("meta"):
            module = LTX2Vocoder(**_arguments(vocoder, mel_bins))
    return Blueprint(module, {f"vocoder.{_name_on_disk(name)}": name for name in module.state_dict()})


def _with_bandwidth_extension(first: dict[str, Any], extension: dict[str, Any], mel_bins: int) -> nn.Module:
    second = _arguments(extension, extension["num_mels"])
    with torch.device("meta"):
        module = LTX2VocoderWithBWE(
            **_arguments(first, mel_bins),
            **{f"bwe_{name}": value for name, value in second.items()},
            filter_length=extension["n_fft"],
            hop_length=extension["hop_length"],
            window_length=extension["win_size"],
            num_mel_channels=extension["num_mels"],
            input_sampling_rate=extension["input_sampling_rate"],
            output_sampling_rate=extension["output_sampling_rate"],
        )
    # Its filter is computed, no tensor of the file, so it must not stay on the meta device.
    ratio = extension["output_sampling_rate"] // extension["input_sampling_rate"]
    module.resampler = UpSample1d(ratio=ratio, window_type="hann", persistent=False)
    # The library reads this where sound has to be padded to whole hops, and nowhere sets it.
    module.hop_length = extension["hop_length"]
    return module


def _arguments(vocoder: dict[str, Any], mel_bins: int) -> dict[str, Any]:
    channels = 2 if vocoder["stereo"] else 1
    arguments = {
        "in_channels": channels * mel_bins,
        "hidden_channels": vocoder["upsample_initial_channel"],
        "out_channels": channels,
        "upsample_kernel_sizes": vocoder["upsample_kernel_sizes"],
        "upsample_factors": vocoder["upsample_rates"],
        "resnet_kernel_sizes": vocoder["resblock_kernel_sizes"],
        "resnet_dilations": vocoder["resblock_dilation_sizes"],
    }
    kind = vocoder["resblock"]
    if kind == "1":
        return arguments
    if kind != "AMP1" or vocoder["activation"] != "snakebeta":
        raise UsageError(f"the checkpoint's vocoder must be of blocks '1' or 'AMP1' with snakebeta, got {kind!r}")
    # Left to its default, the library lets the first stage pass 1; the published one is bounded before it is extended.
    bounded = "tanh" if vocoder["use_tanh_at_final"] else "clamp"
    arguments |= {
        "act_fn": "snakebeta",
        "antialias": True,
        "final_act_fn": bounded if vocoder.get("apply_final_activation", True) else None,
        "final_bias": vocoder["use_bias_at_final"],
    }
    return arguments


def waveform_rate_hz(audio_vae: dict[str, Any], vocoder: dict[str, Any]) -> int:
    """Samples a second of what the vocoder of these sections makes."""
    if "bwe" in vocoder:
        return int(Section(vocoder["bwe"])["output_sampling_rate"])
    form = Section(audio_vae["preprocessing"])
    mel_rate_hz = Section(form["audio"])["sampling_rate"] / Section(form["stft"])["hop_length"]
    return int(mel_rate_hz * math.prod(vocoder["upsample_rates"]))


def _name_on_disk(name: str) -> str:
    for pattern, replacement in _NAMES_ON_DISK.items():
        name = re.sub(pattern, replacement, name)
    return name
