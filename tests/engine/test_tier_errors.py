"""The measure of a tier's errors: nothing where a tier leaves nothing out, more where it leaves out more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.config.recipe import StageConfig
from pipeline.geometry import PixelShape
from tests.tier_errors import attention_watched, error_report, psnr_db

# 16x10x16 latents: 20 blocks, of which each sees 14.
PIXELS = PixelShape(121, 320, 512, 24.0)
STAGE = StageConfig(sigmas=[0.9, 0.5, 0.0])
SPARSE = {
    "attention": "block_sparse", "dense_first_layers": 1, "dense_last_layers": 0, "dense_below_tokens": 0,
    "dense_above_level": 0.5,
}  # fmt: skip


@pytest.fixture
def report(nano_model, load):
    return lambda **precision: error_report(
        lambda: load(nano_model), lambda: load(nano_model, **precision), STAGE, PIXELS
    )


def test_the_exact_tier_has_no_errors(report):
    found = report()
    assert found.attention_error == {}
    assert found.latent_cosine == pytest.approx([1.0, 1.0], abs=1e-12)
    assert found.decoded_psnr_db == math.inf


def test_sparse_layers_are_measured_in_sparse_steps_and_others_not(report):
    found = report(**SPARSE)
    assert list(found.attention_error) == [1] and 1e-4 < found.attention_error[1] < 0.5
    first, last = found.latent_cosine
    assert first == pytest.approx(1.0, abs=1e-6), "the first step is above the level, so dense, in another order"
    assert 0.99 < last <= 1 and found.decoded_psnr_db > 40


def test_a_step_cache_shows_in_the_latents(report):
    found = report(step_cache_threshold=0.9)
    first, last = found.latent_cosine
    assert first == pytest.approx(1.0, abs=1e-12) and 0.5 < last < 1 - 1e-9
    assert found.attention_error == {} and found.decoded_psnr_db < math.inf


def test_watching_leaves_the_slots_as_they_were(nano_model, load):
    engine = load(nano_model, **SPARSE)
    slots = [block.video.self_attention.attend for block in engine.denoiser.blocks]
    with attention_watched(engine):
        pass
    assert [block.video.self_attention.attend for block in engine.denoiser.blocks] == slots


def test_signal_to_noise_of_one_level_is_48_decibels():
    frames = np.zeros((2, 3, 4, 3), dtype=np.uint8)
    assert psnr_db(frames + np.uint8(1), frames) == pytest.approx(20 * math.log10(255))
