"""Every published latent upsampler agrees with the reference, and a file of another kind is refused."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx_latent_upsample import LTXLatentUpsamplePipeline
from safetensors.torch import load_file, save_file

from pipeline.engine.components.upsampler import adapt_statistics, compress_range, load_latent_upsampler
from pipeline.engine.latents import ChannelStatistics
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import CheckpointFile

BOUND = 5e-6
SCALES = {
    "ltx2_0_rational_x2": (2.0, 1),
    "ltx2_3_x2": (2.0, 1),
    "ltxv_0_9_8_x2": (2.0, 1),
    "rational_x1_5": (1.5, 1),
    "temporal_x2": (1.0, 2),
}


@pytest.fixture
def upsampled(fixtures, golden):
    """A case and what our upsampler makes of its latent."""

    def run(name):
        case = golden(f"latent_upsampler/case_{name}")
        statistics = ChannelStatistics(16)
        statistics.mean, statistics.std = case["in.mean_of_means"], case["in.std_of_means"]
        file = CheckpointFile(fixtures / f"latent_upsampler/model_{name}.safetensors")
        space, time = SCALES[name]
        upsampler = load_latent_upsampler(
            file, statistics, spatial_scale=space, temporal_scale=time, device="cpu", dtype=None
        )
        return case, upsampler.upsample(case["in.latent"])

    return run


@pytest.mark.parametrize("name", SCALES)
def test_trap_18_upsampler_works_on_unnormalised_latents(upsampled, name):
    case, latent = upsampled(name)
    case.assert_close("out.upsampled_normalised", latent, bound=BOUND)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "out.adain"), (0.5, "out.adain_factor_0_5")])
def test_statistics_are_adapted_to_those_before_upsampling(upsampled, factor, expected):
    case, latent = upsampled("ltxv_0_9_8_x2")
    case.assert_close(expected, adapt_statistics(latent, case["in.latent"], factor=factor), bound=BOUND)


def test_each_clip_of_a_batch_is_adapted_by_itself():
    latent, reference = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 2, 2)
    together = adapt_statistics(latent, reference)
    assert torch.allclose(together[1:], adapt_statistics(latent[1:], reference[1:]), atol=1e-6)


@pytest.mark.parametrize("compression", [0.0, 0.6, 1.0])
def test_range_is_compressed_as_the_library_does(compression):
    latent = torch.randn(1, 4, 2, 3, 3) * 3
    expected = LTXLatentUpsamplePipeline.tone_map_latents(None, latent, compression)
    assert torch.allclose(compress_range(latent, compression=compression), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"), [("temporal_upsample", True), ("spatial_scale", 1.5), ("_class_name", "Other")]
)
def test_upscaler_of_another_kind_is_refused(fixtures, tmp_path, key, value):
    source = fixtures / "latent_upsampler/model_ltx2_0_rational_x2.safetensors"
    config = CheckpointFile(source).config | {key: value}
    save_file(load_file(source), tmp_path / "other.safetensors", {"config": json.dumps(config)})
    with pytest.raises(UsageError, match=key):
        load_latent_upsampler(
            CheckpointFile(tmp_path / "other.safetensors"), ChannelStatistics(16), device="cpu", dtype=None
        )


def test_upscaler_with_more_tensors_than_it_needs_is_refused(fixtures, tmp_path):
    source = fixtures / "latent_upsampler/model_ltx2_3_x2.safetensors"
    path = tmp_path / "more.safetensors"
    config = json.dumps(CheckpointFile(source).config)
    save_file(load_file(source) | {"surplus": torch.zeros(1)}, path, {"config": config})
    with pytest.raises(CheckpointMismatch, match="surplus"):
        load_latent_upsampler(CheckpointFile(path), ChannelStatistics(16), device="cpu", dtype=None)


def test_upscaler_for_another_latent_is_refused(fixtures):
    file = CheckpointFile(fixtures / "latent_upsampler/model_ltx2_0_rational_x2.safetensors")
    with pytest.raises(UsageError, match="16 latent channels, the model has 128"):
        load_latent_upsampler(file, ChannelStatistics(128), device="cpu", dtype=None)


def test_denoiser_checkpoint_is_not_taken_for_an_upscaler(fixtures):
    file = CheckpointFile(fixtures / "e2e_ltx2_0/checkpoint.safetensors")
    with pytest.raises(UsageError, match="must hold a LatentUpsampler"):
        load_latent_upsampler(file, ChannelStatistics(16), device="cpu", dtype=None)
