"""Every published video autoencoder agrees with the reference, whole and in tiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from kernels.ops import reference_ops
from pipeline.engine.components.streamed_decoder import Manner
from pipeline.engine.components.video_vae import DecodeNoise, load_video_decoder, load_video_encoder, manner_on
from pipeline.engine.decode import decode_frames
from pipeline.engine.tiling import Span, Tiles, decode_in_tiles, encode_in_tiles, tiles_of_count, tiles_of_size
from pipeline.errors import UsageError
from pipeline.geometry import PixelShape, render_shape
from pipeline.model.checkpoint import CheckpointFile
from tests.engine.pictures import planes_of

BOUND = 5e-6


@pytest.fixture
def decoder(fixtures):
    def load(folder):
        return load_video_decoder(CheckpointFile(fixtures / folder / "model.safetensors"), device="cpu", dtype=None)

    return load


@pytest.fixture
def encoder(fixtures):
    def load(folder):
        return load_video_encoder(CheckpointFile(fixtures / folder / "model.safetensors"), device="cpu", dtype=None)

    return load


def test_a_gpu_decodes_eight_frames_at_a_time_by_fused_operations_and_a_cpu_one_by_the_library(decoder):
    """Another number or another way changes bits: raise RENDER_REVISION."""
    ops = reference_ops()
    assert manner_on("cuda:1", ops) == Manner(8, fused=ops)
    assert manner_on("cpu", ops) == decoder("vae_ltx2_0").manner == Manner(1, fused=None)


@pytest.mark.parametrize("folder", ["vae_ltx2_0", "vae_ltx2_3"])
def test_trap_22_decoder_agrees_with_the_reference(golden, decoder, folder):
    case = golden(f"{folder}/case_decode")
    case.assert_close("out.video", decoder(folder).decode(case["in.latent"]), bound=BOUND)


@pytest.mark.parametrize("folder", ["vae_ltx2_0", "vae_ltx2_3"])
@pytest.mark.parametrize("what", ["encode", "encode_image"])
def test_trap_23_encoder_gives_the_normalised_mean(golden, encoder, folder, what):
    case = golden(f"{folder}/case_{what}")
    case.assert_close("out.latent", encoder(folder).encode(case["in.video"]), bound=BOUND)


def test_trap_22_one_key_for_both_directions_decides_the_padding(fixtures, tmp_path):
    source = fixtures / "vae_ltx2_0/model.safetensors"
    config = CheckpointFile(source).config
    config["vae"]["spatial_padding_mode"] = "zeros"
    save_file(load_file(source), tmp_path / "zeros.safetensors", {"config": json.dumps(config)})
    latent = torch.ones(1, 16, 1, 2, 2)
    reflected, zeros = (
        load_video_decoder(CheckpointFile(path), device="cpu", dtype=None).decode(latent)
        for path in (source, tmp_path / "zeros.safetensors")
    )
    assert not torch.equal(reflected, zeros)


def test_ltxv_encoder_gives_both_moments_of_the_posterior(golden, encoder):
    case = golden("vae_ltxv_0_9_8/case_encode")
    vae = encoder("vae_ltxv_0_9_8")
    mean, log_variance = vae.moments(case["in.video"])
    case.assert_close("out.latent_mean_raw", mean, bound=BOUND)
    case.assert_close("out.logvar", log_variance, bound=BOUND)
    case.assert_close("out.latent", vae.encode(case["in.video"]), bound=BOUND)


def test_trap_23_ltxv_draws_from_the_posterior_before_normalising(golden, encoder):
    case = golden("vae_ltxv_0_9_8/case_encode")
    vae = encoder("vae_ltxv_0_9_8")
    drawn = vae.encode(case["in.video"], noise=torch.ones)
    raw = case["out.latent_mean_raw"] + (0.5 * case["out.logvar"]).exp()
    assert torch.allclose(drawn, vae.statistics.normalise(raw, dim=1), atol=1e-5)


def test_ltxv_decoder_is_told_the_timestep(golden, decoder):
    case = golden("vae_ltxv_0_9_8/case_decode_t0")
    noise = DecodeNoise(case.params["decode_timestep"])
    case.assert_close("out.video", decoder("vae_ltxv_0_9_8").decode(case["in.latent"], noise=noise), bound=BOUND)


def test_trap_23_ltxv_mixes_noise_in_before_unnormalising(golden, decoder):
    case = golden("vae_ltxv_0_9_8/case_decode_timestep")
    noise = DecodeNoise(case.params["decode_timestep"], case.params["decode_noise_scale"], case["in.noise"])
    case.assert_close("out.video", decoder("vae_ltxv_0_9_8").decode(case["in.latent"], noise=noise), bound=BOUND)


def test_decode_timestep_must_suit_the_decoder(decoder):
    latent = torch.zeros(1, 16, 1, 1, 1)
    with pytest.raises(UsageError, match="must be given a decode timestep"):
        decoder("vae_ltxv_0_9_8").decode(latent)
    with pytest.raises(UsageError, match="takes no decode timestep"):
        decoder("vae_ltx2_0").decode(latent, noise=DecodeNoise(0.05))


def _tiles(config):
    return tiles_of_size(frames=config["frames"], height_px=config["height"], width_px=config["width"])


def test_trap_24_tiles_by_size_are_blended_as_the_reference_does(golden, decoder):
    case = golden("vae_ltx2_0/case_decode_tiled")
    tiles = _tiles(case.params["tile_size_config"])
    case.assert_close("out.video", decoder("vae_ltx2_0").decode(case["in.latent"], tiles=tiles), bound=BOUND)


def test_trap_24_tiles_by_count_are_blended_as_the_reference_does(golden, decoder):
    case = golden("vae_ltx2_0/case_decode_tiled_count")
    latent, counts = case["in.latent"], case.params["tile_count_config"]
    tiles = tiles_of_count(tuple(latent.shape[2:]), **counts)
    case.assert_close("out.video", decoder("vae_ltx2_0").decode(latent, tiles=tiles), bound=BOUND)


def test_trap_24_tiled_encode_agrees_with_the_reference(golden, encoder):
    case = golden("vae_ltx2_0/case_encode_tiled")
    vae, video = encoder("vae_ltx2_0"), case["in.video_uint8"].float() / 127.5 - 1
    case.assert_close("out.latent_full", vae.encode(video), bound=BOUND)
    tiled = vae.encode(video, tiles=_tiles(case.params["tile_size_config"]))
    case.assert_close("out.latent", tiled, bound=BOUND)
    assert (tiled - case["out.latent_full"]).abs().max() > 0.1, "or nothing was tiled"


TILES = [
    Tiles(),
    Tiles(frames=Span(2, 1)),
    Tiles(frames=Span(3, 0), height=Span(2, 1), width=Span(3, 2)),
    Tiles(frames=Span(2, 0), height=Span(1, 0), width=Span(4, 1)),
]


def _enlarged(latent):
    size = ((latent.shape[2] - 1) * 8 + 1, latent.shape[3] * 32, latent.shape[4] * 32)
    pixels = interpolate(latent, scale_factor=(8, 32, 32), mode="nearest")[:, :, 7:]
    assert pixels.shape[2:] == size
    return pixels


@pytest.mark.parametrize("tiles", TILES)
def test_tiles_of_a_network_that_sees_one_cell_give_the_whole(tiles):
    latent = torch.randn(1, 2, 6, 3, 5)
    assert torch.allclose(decode_in_tiles(_enlarged, latent, tiles), _enlarged(latent), atol=1e-6)
    video = _enlarged(latent)
    shrunk = encode_in_tiles(lambda tile: tile[:, :, ::8, ::32, ::32], video, tiles)
    assert torch.allclose(shrunk, latent, atol=1e-6)


def test_later_tiles_in_time_begin_one_latent_earlier():
    seen = []

    def decode(tile):
        seen.append(tile[0, 0, :, 0, 0].tolist())
        return _enlarged(tile)

    decode_in_tiles(decode, torch.arange(5.0).view(1, 1, 5, 1, 1), Tiles(frames=Span(3, 1)))
    assert seen == [[0, 1, 2], [1, 2, 3, 4]]


def test_no_tile_is_larger_than_asked_for():
    seen = []

    def decode(tile):
        seen.append(tuple(tile.shape[2:]))
        return _enlarged(tile)

    decode_in_tiles(decode, torch.zeros(1, 1, 3, 7, 4), tiles_of_size(height_px=(128, 32), width_px=(64, 32)))
    assert set(seen) == {(3, 4, 2)}
    assert len(seen) == 2 * 3


@pytest.mark.parametrize("overlap", [-1, 2, 3])
def test_overlap_that_leaves_no_progress_is_refused(overlap):
    with pytest.raises(UsageError, match="overlap"):
        Span(2, overlap)


def test_frames_of_a_file_can_be_decoded_in_tiles(golden, decoder):
    latent = golden("vae_ltx2_0/case_decode_tiled")["in.latent"]
    vae, shape = decoder("vae_ltx2_0"), render_shape(PixelShape(17, 64, 96, 24.0), 32)
    tiles = tiles_of_size(width_px=(64, 32))
    tiled, whole = (planes_of(decode_frames(vae, latent, shape, tiles=cut)) for cut in (tiles, None))
    expected, _ = vae.ops.rgb_to_yuv420(vae.decode(latent, tiles=tiles)[0])
    assert np.array_equal(tiled, expected.numpy())
    assert not np.array_equal(tiled, whole)
