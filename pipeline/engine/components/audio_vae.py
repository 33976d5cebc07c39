"""The audio autoencoder of LTX-2: waveform to log-mel spectrogram to latents, and latents back to a spectrogram.

From a spectrogram to a waveform is the vocoder's way (`vocoder.py`). LTX-Video has no sound.

Shapes: B batch, C channels, T time, M mel or latent bins, N samples, K frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import LTX2AudioDecoder, LTX2AudioEncoder
from torch import Tensor, nn
from torch.nn import functional

from pipeline.engine.components.blueprint import Blueprint, Section, load_statistics, section
from pipeline.engine.latents import ChannelStatistics, patchify_audio, unpatchify_audio
from pipeline.model.checkpoint import CheckpointFile

LATENT_BIN_DIVISOR = 4
# Below this a mel band is silence.
_MEL_FLOOR = 1e-5
# Zero crossings of the resampling filter, and how far below the lower Nyquist frequency it cuts.
_RESAMPLE_CROSSINGS = 6
_RESAMPLE_ROLLOFF = 0.99


class AudioDecoder:
    """Normalised audio latents (B,C,T,M) to a log-mel spectrogram (B,channels,4T-3,mel bins)."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics, *, num_latent_bins: int) -> None:
        self._module = module
        self._statistics = statistics
        self.num_latent_bins = num_latent_bins

    def decode(self, latent_BCTM: Tensor) -> Tensor:
        # The statistics belong to the flattened (channel, bin) vector, not to channels alone.
        flat_BTC = self._statistics.unnormalise(patchify_audio(latent_BCTM.float()), dim=2)
        latent = unpatchify_audio(flat_BTC, self.num_latent_bins)
        return self._module(latent.to(next(self._module.parameters()).dtype))


class AudioEncoder:
    """Log-mel spectrograms (B,channels,T,mel bins), or waveforms, to normalised audio latents (B,C,(T+3)/4,M)."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics, mel: MelSpectrogram) -> None:
        self._module = module
        self._statistics = statistics
        self.mel = mel

    def encode(self, mel_BCTM: Tensor) -> Tensor:
        """The posterior's mean, float32."""
        moments = self._module(mel_BCTM.to(next(self._module.parameters()).dtype)).float()
        mean_BCTM = moments.chunk(2, dim=1)[0]
        normalised = self._statistics.normalise(patchify_audio(mean_BCTM), dim=2)
        return unpatchify_audio(normalised, mean_BCTM.shape[3])

    def encode_waveform(self, waveform_BCN: Tensor, *, sample_rate_hz: int) -> Tensor:
        """The same for a waveform in [-1,1] of any rate, with as many channels as the model has."""
        return self.encode(self.mel(resample(waveform_BCN, sample_rate_hz, self.mel.sample_rate_hz)))


class MelSpectrogram(nn.Module):
    """Waveform (B,C,N) to the natural logarithm of its mel magnitudes (B,C,N//hop+1,M), float32.

    Magnitude, not power; Hann window, frames centred on their hop with the ends mirrored; Slaney's mel scale and
    band weights (M. Slaney, Auditory Toolbox, 1998).
    """

    window: Tensor
    filters_MK: Tensor

    def __init__(
        self, *, sample_rate_hz: int, fft_size: int, hop: int, num_bins: int, range_hz: tuple[float, float]
    ) -> None:
        super().__init__()
        self.sample_rate_hz = sample_rate_hz
        self._hop = hop
        self.register_buffer("window", torch.hann_window(fft_size))
        self.register_buffer("filters_MK", _mel_filters(sample_rate_hz, fft_size, num_bins, range_hz))

    def forward(self, waveform_BCN: Tensor) -> Tensor:
        spectrum = torch.stft(
            waveform_BCN.float().flatten(0, 1),
            n_fft=len(self.window),
            hop_length=self._hop,
            window=self.window,
            return_complex=True,
        )
        mel = (self.filters_MK @ spectrum.abs()).clamp(min=_MEL_FLOOR).log()
        return mel.unflatten(0, waveform_BCN.shape[:2]).transpose(2, 3)


def resample(waveform_BCN: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """The waveform at another rate, ceil(N*to/from) samples: a low-pass sinc filter under a Hann window, float32.

    The filter is that of torchaudio's `resample` (J. O. Smith, Digital Audio Resampling), whose numbers the reference
    has.
    """
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    if old == new:
        return waveform_BCN.float()
    cutoff = min(old, new) * _RESAMPLE_ROLLOFF
    reach = math.ceil(_RESAMPLE_CROSSINGS * old / cutoff)
    # One filter for each of the `new` places that an output sample may have between two input samples.
    place = torch.arange(new, dtype=torch.float64)[:, None] / -new
    t = (place + torch.arange(-reach, reach + old, dtype=torch.float64) / old) * cutoff
    t = t.clamp(-_RESAMPLE_CROSSINGS, _RESAMPLE_CROSSINGS)
    filters = torch.sinc(t) * torch.cos(t * math.pi / _RESAMPLE_CROSSINGS / 2) ** 2 * (cutoff / old)
    num_samples = waveform_BCN.shape[2]
    padded = functional.pad(waveform_BCN.float().flatten(0, 1)[:, None], (reach, reach + old))
    phases = functional.conv1d(padded, filters.to(padded)[:, None], stride=old)
    length = math.ceil(new * num_samples / old)
    return phases.transpose(1, 2).flatten(1)[:, :length].unflatten(0, waveform_BCN.shape[:2])


def load_audio_decoder(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> AudioDecoder:
    """Audio decoder of a single-file checkpoint, with its channel statistics in float32."""
    audio_vae = section(checkpoint.config, "audio_vae")
    module = audio_decoder_blueprint(audio_vae).fill(checkpoint, device=device, dtype=dtype, what="the audio decoder")
    num_bins = audio_sizes(audio_vae)["mel_bins"] // LATENT_BIN_DIVISOR
    return AudioDecoder(module, _statistics(checkpoint, device), num_latent_bins=num_bins)


def load_audio_encoder(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> AudioEncoder:
    """Audio encoder of a single-file checkpoint, with its channel statistics and the spectrogram it was trained on."""
    audio_vae = section(checkpoint.config, "audio_vae")
    module = audio_encoder_blueprint(audio_vae).fill(checkpoint, device=device, dtype=dtype, what="the audio encoder")
    form = Section(audio_vae["preprocessing"])
    stft, mel = Section(form["stft"]), Section(form["mel"])
    spectrogram = MelSpectrogram(
        sample_rate_hz=Section(form["audio"])["sampling_rate"],
        fft_size=stft["filter_length"],
        hop=stft["hop_length"],
        num_bins=mel["n_mel_channels"],
        range_hz=(mel["mel_fmin"], mel["mel_fmax"]),
    )
    return AudioEncoder(module, _statistics(checkpoint, device), spectrogram.to(device))


def audio_decoder_blueprint(audio_vae: dict[str, Any]) -> Blueprint:
    """Decoder of the `audio_vae` section; names on disk are the library's."""
    with torch.device("meta"):
        module = LTX2AudioDecoder(**_arguments(audio_vae))
    return Blueprint(module, {f"audio_vae.decoder.{name}": name for name in module.state_dict()})


def audio_encoder_blueprint(audio_vae: dict[str, Any]) -> Blueprint:
    """Encoder of the `audio_vae` section; names on disk are the library's."""
    with torch.device("meta"):
        module = LTX2AudioEncoder(**_arguments(audio_vae), double_z=audio_sizes(audio_vae)["double_z"])
    return Blueprint(module, {f"audio_vae.encoder.{name}": name for name in module.state_dict()})


def audio_sizes(audio_vae: dict[str, Any]) -> Section:
    """Sizes of the networks in the `audio_vae` section."""
    return Section(Section(Section(audio_vae["model"])["params"])["ddconfig"])


def _arguments(audio_vae: dict[str, Any]) -> dict[str, Any]:
    sizes = audio_sizes(audio_vae)
    return {
        "base_channels": sizes["ch"],
        "output_channels": sizes["out_ch"],
        "num_res_blocks": sizes["num_res_blocks"],
        "attn_resolutions": tuple(sizes["attn_resolutions"]),
        "in_channels": sizes["in_channels"],
        "resolution": sizes["resolution"],
        "latent_channels": sizes["z_channels"],
        "ch_mult": tuple(sizes["ch_mult"]),
        "norm_type": sizes["norm_type"],
        "causality_axis": sizes["causality_axis"],
        "mid_block_add_attention": sizes["mid_block_add_attention"],
        "mel_bins": sizes["mel_bins"],
    }


def _statistics(checkpoint: CheckpointFile, device: str) -> ChannelStatistics:
    sizes = audio_sizes(section(checkpoint.config, "audio_vae"))
    num_channels = sizes["z_channels"] * (sizes["mel_bins"] // LATENT_BIN_DIVISOR)
    return load_statistics(checkpoint, "audio_vae", num_channels=num_channels, device=device)


def _mel_filters(sample_rate_hz: int, fft_size: int, num_bins: int, range_hz: tuple[float, float]) -> Tensor:
    """Triangles (M,K) over the frequencies of the transform, each of unit area."""
    low, high = (_hz_to_mel(hz) for hz in range_hz)
    corners = torch.tensor([_mel_to_hz(low + (high - low) * i / (num_bins + 1)) for i in range(num_bins + 2)])
    frequencies_K = torch.linspace(0, sample_rate_hz / 2, fft_size // 2 + 1)
    left, middle, right = (corners[i : i + num_bins, None] for i in range(3))
    rising, falling = (frequencies_K - left) / (middle - left), (right - frequencies_K) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (right - left))


# Slaney's scale: 200/3 Hz a mel up to 1 kHz, then 27 mels for each factor of 6.4.
_HZ_PER_MEL = 200 / 3
_LOG_FROM_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_FROM_HZ:
        return hz / _HZ_PER_MEL
    return _LOG_FROM_HZ / _HZ_PER_MEL + math.log(hz / _LOG_FROM_HZ) / _LOG_STEP


def _mel_to_hz(mel: float) -> float:
    logarithmic_from = _LOG_FROM_HZ / _HZ_PER_MEL
    if mel < logarithmic_from:
        return mel * _HZ_PER_MEL
    return _LOG_FROM_HZ * math.exp(_LOG_STEP * (mel - logarithmic_from))
