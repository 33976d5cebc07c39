"""The audio autoencoder and both vocoders agree with the reference."""

from __future__ import annotations

import pytest
import torch

from pipeline.engine.components.audio_vae import load_audio_decoder, load_audio_encoder, resample
from pipeline.engine.components.blueprint import section
from pipeline.engine.components.vocoder import Vocoder, load_vocoder, vocoder_blueprint
from pipeline.errors import UsageError
from pipeline.model.checkpoint import CheckpointFile

BOUND = 5e-6


@pytest.fixture
def audio_vae(fixtures):
    return CheckpointFile(fixtures / "audio_vae/model.safetensors")


@pytest.fixture
def vocoder(fixtures):
    def load(folder):
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        plan = vocoder_blueprint(section(checkpoint.config, "vocoder"), mel_bins=64)
        return Vocoder(plan.fill(checkpoint, device="cpu", dtype=None, what="the vocoder"), sample_rate_hz=48000)

    return load


def test_trap_25_decoder_agrees_with_the_reference(golden, audio_vae):
    case = golden("audio_vae/case_decode")
    decoder = load_audio_decoder(audio_vae, device="cpu", dtype=None)
    mel = decoder.decode(case["in.latent"])
    case.assert_close("out.mel", mel, bound=BOUND)
    assert mel.shape[2] == 4 * case["in.latent"].shape[2] - 3


def test_trap_25_encoder_normalises_the_flattened_vector(golden, audio_vae):
    case = golden("audio_vae/case_encode")
    encoder = load_audio_encoder(audio_vae, device="cpu", dtype=None)
    case.assert_close("out.latent", encoder.encode(case["in.mel"]), bound=BOUND)


def test_spectrogram_of_a_waveform_agrees_with_the_reference(golden, audio_vae):
    case = golden("audio_vae/case_waveform_to_latent")
    encoder = load_audio_encoder(audio_vae, device="cpu", dtype=None)
    case.assert_close("out.mel_16k", encoder.mel(case["in.waveform_16k"]), bound=BOUND)
    latent = encoder.encode_waveform(case["in.waveform_16k"], sample_rate_hz=16000)
    case.assert_close("out.latent_16k", latent, bound=BOUND)


def test_waveform_of_another_rate_is_resampled_as_the_reference_does(golden, audio_vae):
    case = golden("audio_vae/case_waveform_to_latent")
    encoder = load_audio_encoder(audio_vae, device="cpu", dtype=None)
    resampled = resample(case["in.waveform_24k"], 24000, 16000)
    case.assert_close("out.resampled_24k_to_16k", resampled, bound=BOUND)
    case.assert_close("out.mel_24k", encoder.mel(resampled), bound=BOUND)
    through = encoder.encode_waveform(case["in.waveform_24k"], sample_rate_hz=24000)
    assert torch.equal(through, encoder.encode_waveform(resampled, sample_rate_hz=16000))


@pytest.mark.parametrize(("rate", "samples"), [(8000, 2001), (44100, 11025), (48000, 12001)])
def test_resampled_tone_is_the_same_tone(rate, samples):
    def tone(hz, count):
        return torch.sin(2 * torch.pi * 440 * torch.arange(count, dtype=torch.float64) / hz).float()[None, None]

    resampled = resample(tone(rate, samples), rate, 16000)
    assert resampled.shape[2] == -(-samples * 16000 // rate)
    middle = slice(100, 3000)
    assert torch.allclose(resampled[..., middle], tone(16000, resampled.shape[2])[..., middle], atol=5e-3)


def test_vocoder_of_ltx2_0_agrees_with_the_reference(golden, vocoder):
    case = golden("vocoder_ltx2_0/case_vocode")
    case.assert_close("out.waveform", vocoder("vocoder_ltx2_0").synthesise(case["in.mel"]), bound=BOUND)


def test_vocoder_of_ltx2_3_agrees_with_the_reference(golden, vocoder):
    case = golden("vocoder_ltx2_3/case_vocode")
    case.assert_close("out.waveform", vocoder("vocoder_ltx2_3").synthesise(case["in.mel"]), bound=BOUND)


def test_trap_26_first_stage_of_the_vocoder_is_clamped(golden, vocoder):
    case = golden("vocoder_ltx2_3/case_vocode_loud")
    assert case["mid.waveform_low_rate"].abs().max() == 1
    case.assert_close("out.waveform", vocoder("vocoder_ltx2_3").synthesise(case["in.mel"]), bound=BOUND)


def test_trap_26_vocoder_runs_in_float32_whatever_it_is_given(golden, vocoder):
    case = golden("vocoder_ltx2_3/case_vocode")
    given = case["in.mel"].bfloat16()
    synthesise = vocoder("vocoder_ltx2_3").synthesise
    assert torch.equal(synthesise(given), synthesise(given.float()))


def test_sample_rate_of_ltx2_0_is_the_mel_rate_times_the_upsampling(fixtures):
    checkpoint = CheckpointFile(fixtures / "e2e_ltx2_0/checkpoint.safetensors")
    assert load_vocoder(checkpoint, device="cpu").sample_rate_hz == 100 * 3 * 2


def test_sample_rate_of_ltx2_3_is_the_extended_one(fixtures, audio_vae):
    checkpoint = CheckpointFile(fixtures / "vocoder_ltx2_3/model.safetensors")
    checkpoint.config["audio_vae"] = audio_vae.config["audio_vae"]
    assert load_vocoder(checkpoint, device="cpu").sample_rate_hz == 48000


def test_vocoder_of_an_unknown_kind_is_refused(fixtures):
    config = CheckpointFile(fixtures / "vocoder_ltx2_0/model.safetensors").config["vocoder"]
    with pytest.raises(UsageError, match="'2'"):
        vocoder_blueprint(config | {"resblock": "2"}, mel_bins=64)
