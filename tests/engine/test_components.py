"""Every part agrees with the reference on its golden case, and refuses files that are not its own."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine import components
from pipeline.engine.latents import ChannelStatistics
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import CheckpointFile


@pytest.fixture
def rewritten(fixtures, tmp_path):
    """A copy of a fixture's checkpoint after `change(tensors, config)`."""

    def build(name, change):
        source = CheckpointFile(fixtures / name)
        tensors, config = load_file(fixtures / name), source.config
        change(tensors, config)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, {"config": json.dumps(config)})
        return CheckpointFile(path)

    return build


def test_video_decoder_agrees_with_the_reference(fixtures, golden):
    case = golden("vae_ltx2_0/case_decode")
    checkpoint = CheckpointFile(fixtures / "vae_ltx2_0/model.safetensors")
    decoder = components.load_video_decoder(checkpoint, device="cpu", dtype=None)
    case.assert_close("out.video", decoder.decode(case["in.latent"]))


def test_audio_decoder_agrees_with_the_reference(fixtures, golden):
    case = golden("audio_vae/case_decode")
    checkpoint = CheckpointFile(fixtures / "audio_vae/model.safetensors")
    decoder = components.load_audio_decoder(checkpoint, device="cpu", dtype=None)
    case.assert_close("out.mel", decoder.decode(case["in.latent"]))


def test_vocoder_agrees_with_the_reference(fixtures, golden):
    case = golden("vocoder_ltx2_0/case_vocode")
    checkpoint = CheckpointFile(fixtures / "vocoder_ltx2_0/model.safetensors")
    plan = components.vocoder_blueprint(components.section(checkpoint.config, "vocoder"), mel_bins=64)
    vocoder = components.Vocoder(plan.fill(checkpoint, device="cpu", dtype=None, what="vocoder"), sample_rate_hz=600)
    case.assert_close("out.waveform", vocoder.synthesise(case["in.mel"]))


def test_text_connectors_agree_with_the_reference(fixtures, golden):
    case = golden("text_connectors_ltx2_0/case_process")
    checkpoint = CheckpointFile(fixtures / "text_connectors_ltx2_0/model.safetensors")
    connectors = components.load_text_connectors(checkpoint, device="cpu", dtype=None)
    context = connectors.connect(components.TextStates(case["in.hidden_states"], case["in.attention_mask"]))
    case.assert_close("out.video_encoding", context.video_BSD)
    case.assert_close("out.audio_encoding", context.audio_BSD)


def test_upsampler_works_on_unnormalised_latents_as_the_reference_does(fixtures, golden):
    case = golden("latent_upsampler/case_ltx2_0_rational_x2")
    file = CheckpointFile(fixtures / "latent_upsampler/model_ltx2_0_rational_x2.safetensors")
    statistics = ChannelStatistics(16)
    statistics.mean, statistics.std = case["in.mean_of_means"], case["in.std_of_means"]
    upsampler = components.load_latent_upsampler(file, statistics, device="cpu", dtype=None)
    case.assert_close("out.upsampled_normalised", upsampler.upsample(case["in.latent"]))


@pytest.fixture(scope="module")
def published(fixtures):
    """Metadata and shapes of the published LTX-2.0 files, but for the denoiser's tensors."""
    return json.loads(gzip.decompress((fixtures / "inventory/parts.json.gz").read_bytes()))


def test_every_published_tensor_outside_the_denoiser_has_an_owner(published):
    file = published["ltx-2-19b-dev.safetensors"]
    encoders = {name for name in file["shapes"] if name.startswith(("vae.encoder.", "audio_vae.encoder."))}
    assert components.tensors_of_parts(file["config"]) == set(file["shapes"]) - encoders


def test_parts_of_published_size_expect_the_published_shapes(published):
    file, upscaler = published["ltx-2-19b-dev.safetensors"], published["ltx-2-spatial-upscaler-x2-1.0.safetensors"]
    config = file["config"]
    for plan in (
        components.text_connectors_blueprint(config["transformer"], num_text_states=49),
        components.video_decoder_blueprint(config["vae"]),
        components.audio_decoder_blueprint(config["audio_vae"]),
        components.vocoder_blueprint(config["vocoder"], mel_bins=64),
        components.statistics_blueprint("vae", num_channels=128),
        components.statistics_blueprint("audio_vae", num_channels=128),
    ):
        tensors = plan.module.state_dict()
        for on_disk, name in plan.names.items():
            assert list(tensors[name].shape) == file["shapes"][on_disk], on_disk
    plan = components.latent_upsampler_blueprint(upscaler["config"])
    assert {name: list(tensor.shape) for name, tensor in plan.module.state_dict().items()} == upscaler["shapes"]


def test_sample_rate_is_the_mel_rate_times_the_upsampling(fixtures):
    checkpoint = CheckpointFile(fixtures / "e2e_ltx2_0/checkpoint.safetensors")
    assert components.load_vocoder(checkpoint, device="cpu").sample_rate_hz == 100 * 3 * 2


def test_one_key_for_both_directions_decides_the_decoders_padding(rewritten):
    def pad_with_zeros(tensors, config):
        config["vae"]["spatial_padding_mode"] = "zeros"

    plain = rewritten("vae_ltx2_0/model.safetensors", lambda tensors, config: None)
    latent = torch.ones(1, 16, 1, 2, 2)
    reflected = components.load_video_decoder(plain, device="cpu", dtype=None).decode(latent)
    zeros = rewritten("vae_ltx2_0/model.safetensors", pad_with_zeros)
    assert not torch.equal(components.load_video_decoder(zeros, device="cpu", dtype=None).decode(latent), reflected)


def test_missing_tensor_is_named(rewritten):
    def drop(tensors, config):
        del tensors["vae.decoder.conv_out.conv.bias"]

    with pytest.raises(CheckpointMismatch, match=r"vae\.decoder\.conv_out\.conv\.bias"):
        components.load_video_decoder(rewritten("vae_ltx2_0/model.safetensors", drop), device="cpu", dtype=None)


def test_missing_section_of_the_metadata_is_named(rewritten):
    def drop(tensors, config):
        del config["vae"]

    with pytest.raises(CheckpointMismatch, match="no section 'vae'"):
        components.load_video_decoder(rewritten("vae_ltx2_0/model.safetensors", drop), device="cpu", dtype=None)


@pytest.mark.parametrize(
    ("key", "value"), [("temporal_upsample", True), ("spatial_scale", 1.5), ("_class_name", "Other")]
)
def test_upscaler_of_another_kind_is_refused(rewritten, key, value):
    def change(tensors, config):
        config[key] = value

    file = rewritten("latent_upsampler/model_ltx2_0_rational_x2.safetensors", change)
    with pytest.raises(UsageError, match=key):
        components.load_latent_upsampler(file, ChannelStatistics(16), device="cpu", dtype=None)


def test_upscaler_for_another_latent_is_refused(fixtures):
    file = CheckpointFile(fixtures / "latent_upsampler/model_ltx2_0_rational_x2.safetensors")
    with pytest.raises(UsageError, match="16 latent channels, the model has 128"):
        components.load_latent_upsampler(file, ChannelStatistics(128), device="cpu", dtype=None)


def test_denoiser_checkpoint_is_not_taken_for_an_upscaler(fixtures):
    file = CheckpointFile(fixtures / "e2e_ltx2_0/checkpoint.safetensors")
    with pytest.raises(UsageError, match="latent upsampler x2"):
        components.load_latent_upsampler(file, ChannelStatistics(16), device="cpu", dtype=None)


def _encoder(folder, max_tokens=128):
    return components.load_text_encoder(folder, max_tokens=max_tokens, device="cpu", dtype=None)


def test_text_encoder_pads_on_the_left_and_gives_every_hidden_state(nano_folder):
    states = _encoder(nano_folder / "gemma-nano").encode(["a red fox", "  a red fox \n"])
    assert states.hidden_BSDL.shape == (2, 128, 48, 4)
    assert torch.isfinite(states.hidden_BSDL).all()
    used = int(states.mask_BS[0].sum())
    assert 1 < used < 128
    assert states.mask_BS[0].tolist() == [0] * (128 - used) + [1] * used
    assert torch.equal(states.hidden_BSDL[0], states.hidden_BSDL[1]), "spaces around a prompt must not matter"


def test_prompt_longer_than_the_limit_is_cut(nano_folder):
    states = _encoder(nano_folder / "gemma-nano").encode(["fox " * 500])
    assert states.hidden_BSDL.shape[1] == 128
    assert states.mask_BS.all()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_text_encoder_folder_is_refused_in_one_line(nano_folder, tmp_path, name):
    folder = tmp_path / "gemma"
    shutil.copytree(nano_folder / "gemma-nano", folder)
    (folder / name).unlink()
    with pytest.raises(UsageError, match="text encoder folder") as refusal:
        _encoder(folder)
    assert "\n" not in str(refusal.value)


def test_absent_text_encoder_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere lacks config\.json"):
        _encoder(tmp_path / "nowhere")


def test_text_encoder_with_missing_tensors_is_refused(nano_folder, tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(nano_folder / "gemma-nano", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"norm\.weight"):
        _encoder(folder)


def test_broken_text_encoder_weights_are_refused(nano_folder, tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(nano_folder / "gemma-nano", folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="text encoder folder"):
        _encoder(folder)


def test_text_length_must_suit_the_registers(nano_folder):
    with pytest.raises(UsageError, match="multiple of 128, got 100"):
        _encoder(nano_folder / "gemma-nano", max_tokens=100)
