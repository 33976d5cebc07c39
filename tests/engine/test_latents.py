"""Packing, positions, noise and normalising agree with the reference and with themselves."""

from __future__ import annotations

import pytest
import torch

from pipeline.engine.latents import (
    ChannelStatistics,
    Tokens,
    add_noise,
    audio_positions,
    empty_tokens,
    patchify_audio,
    patchify_video,
    seeded_noise,
    unpatchify_audio,
    unpatchify_video,
    video_positions,
)
from pipeline.geometry import LatentShape


@pytest.fixture(scope="module")
def coords(golden):
    return golden("coords/case_coords")


def _shape(spec, num_audio=1):
    return LatentShape(spec["f"], spec["h"], spec["w"], num_audio, spec["fps"])


@pytest.mark.parametrize("index", range(3))
def test_video_tokens_and_positions_are_the_references(coords, index):
    spec = coords.params["video"][index]
    latent, tokens = coords[f"in.video{index}.latent"], coords[f"out.video{index}.tokens"]
    assert torch.equal(patchify_video(latent), tokens)
    assert torch.equal(unpatchify_video(tokens, _shape(spec)), latent)
    expected = coords[f"out.video{index}.positions"][:1]
    torch.testing.assert_close(video_positions(_shape(spec), device="cpu"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", range(3))
def test_audio_tokens_and_positions_are_the_references(coords, index):
    count = coords.params["audio"][index]
    latent, tokens = coords[f"in.audio{index}.latent"], coords[f"out.audio{index}.tokens"]
    assert torch.equal(patchify_audio(latent), tokens)
    assert torch.equal(unpatchify_audio(tokens, num_bins=16), latent)
    shape = LatentShape(1, 1, 1, count, 24.0)
    expected = coords[f"out.audio{index}.positions"][:1]
    torch.testing.assert_close(audio_positions(shape, device="cpu"), expected, rtol=0, atol=1e-6)


def test_first_latent_frame_is_one_picture_and_the_next_are_eight():
    seconds = video_positions(LatentShape(3, 1, 1, 1, 8.0), device="cpu")[0, 0]
    assert seconds.tolist() == [[0.0, 0.125], [0.125, 1.125], [1.125, 2.125]]


@pytest.mark.parametrize("scale", [1.0, 0.909375])
def test_trap_15_noising_is_the_references(golden, scale):
    case = golden("schedulers/case_steps")
    mask, clean, latent, noise = (
        case[f"in.{name}"] for name in ("denoise_mask", "noiser_clean", "noiser_latent", "noise")
    )
    noised = add_noise(Tokens(latent, latent), lambda shape: noise, scale)
    # The engine's hold (conditions.py) does the second half.
    case.assert_close(f"out.noiser.scale{scale}", torch.lerp(clean, noised.video_BTC, mask))
    assert torch.equal(noised.video_BTC, noised.audio_BTC)


def test_trap_15_one_generator_draws_video_before_audio():
    start = empty_tokens(LatentShape(1, 1, 2, 3, 24.0), video_channels=4, audio_channels=5, device="cpu")
    noised = add_noise(start, seeded_noise(7), 1.0)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(noised.video_BTC, torch.randn(1, 2, 4, generator=generator))
    assert torch.equal(noised.audio_BTC, torch.randn(1, 3, 5, generator=generator))


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_every_64_bit_seed_gives_its_own_repeatable_noise(seed):
    shape = (1, 4, 8)
    assert torch.equal(seeded_noise(seed)(shape), seeded_noise(seed)(shape))
    assert not torch.equal(seeded_noise(seed)(shape), seeded_noise(seed ^ 1)(shape))


def test_normalising_undoes_unnormalising_along_its_dimension():
    statistics = ChannelStatistics(3)
    statistics.mean, statistics.std = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 2.0, 0.5])
    x = torch.randn(2, 4, 3)
    raw = statistics.unnormalise(x, dim=2)
    torch.testing.assert_close(raw[..., 2], x[..., 2] * 0.5 - 2.0)
    torch.testing.assert_close(statistics.normalise(raw, dim=2), x)
