"""What a tier leaves out of steps: as its settings say, in the steps and layers they name, nothing anywhere else."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.ops import reference_ops
from pipeline.assembly import worker_side
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.engine import loading
from pipeline.engine.engine import Brief, Picture
from pipeline.engine.latents import seeded_noise
from pipeline.errors import UsageError
from pipeline.geometry import PixelShape
from pipeline.model.sparse_attention import SparseAttention
from tests.engine.pictures import planes_of

# 7x8x12 latents: 672 tokens, 6 blocks, of which the first frame is one.
PIXELS = PixelShape(49, 256, 384, 24.0)
# 16x10x16 latents: 20 blocks, of which each sees 14, because the nearest and the first frame may be half of them.
LARGER = PixelShape(121, 320, 512, 24.0)
GUIDANCE = GuidanceConfig(
    video=StreamGuidance(cfg=3.0, stg=1.0, modality=3.0), audio=StreamGuidance(cfg=7.0), stg_blocks=[1]
)
PLAIN = StageConfig(sigmas=[1.0, 0.75, 0.5, 0.25, 0.0])
GUIDED = StageConfig(schedule=ScheduleConfig(num_steps=20), guidance=[GUIDANCE])
SPARSE = {"attention": "block_sparse", "dense_first_layers": 0, "dense_last_layers": 0, "dense_below_tokens": 0}


def sampled(engine, stage=PLAIN, pictures=(), pixels=PIXELS):
    recipe = RecipeConfig(stages=[stage])
    brief = Brief(engine._texts("a red fox", recipe), pixels, pictures=tuple(pictures))
    return engine.sample(brief, recipe, seeded_noise(5), lambda stage: None)


def held_to(frame):
    return Picture(lambda height, width: torch.full((1, 3, 1, height, width), 0.5), frame, 0.8)


def difference(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture
def seen(monkeypatch):
    """Notes (layer's slot, sparse or not) of each call of a slot that may be sparse."""
    calls = []
    plain = SparseAttention.__call__

    def noted(self, q, k, v, bias):
        calls.append(self._in_force.pattern is not None)
        return plain(self, q, k, v, bias)

    monkeypatch.setattr(SparseAttention, "__call__", noted)
    return calls


@pytest.mark.parametrize("frame", [None, 0, 33])
@pytest.mark.parametrize("stage", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_at_full_density_the_clip_is_the_exact_one_within_rounding(nano_model, load, seen, stage, frame):
    if stage is GUIDED:
        stage = replace(stage, schedule=ScheduleConfig(num_steps=3))
    pictures = [] if frame is None else [held_to(frame)]
    exact = sampled(load(nano_model), stage, pictures)
    assert not seen
    whole = sampled(load(nano_model, attention_density=1.0, dense_above_level=1.0, **SPARSE), stage, pictures)
    assert seen and all(seen)
    # Guidance multiplies what rounding makes different.
    bound = 1e-5 if stage is PLAIN else 1e-3
    assert difference(whole.video_BCFHW, exact.video_BCFHW) < bound
    assert difference(whole.audio_BCTM, exact.audio_BCTM) < bound


def test_a_sparse_clip_is_near_the_exact_one_and_not_the_same(nano_model, load):
    exact = sampled(load(nano_model), pixels=LARGER)
    sparse = sampled(load(nano_model, dense_above_level=1.0, **SPARSE), pixels=LARGER)
    assert 1e-5 < difference(sparse.video_BCFHW, exact.video_BCFHW) < 0.05


def test_steps_above_the_level_stay_dense(nano_model, load, seen):
    sampled(load(nano_model, dense_above_level=0.75, **SPARSE))
    assert seen == [False, False] + [True] * 6, "two layers, four steps of which the first is above"


def test_layers_at_both_ends_stay_dense(nano_model, load):
    def sparse_layers(**settings):
        blocks = load(nano_model, **(SPARSE | settings)).denoiser.blocks
        return [isinstance(block.video.self_attention.attend, SparseAttention) for block in blocks]

    assert sparse_layers() == [True, True]
    assert sparse_layers(dense_first_layers=1) == [False, True]
    assert sparse_layers(dense_last_layers=1) == [True, False]


def test_only_the_videos_self_attention_is_sparse(nano_model, load):
    denoiser = load(nano_model, **SPARSE).denoiser
    sparse = {
        name for name, module in denoiser.named_modules() if isinstance(vars(module).get("attend"), SparseAttention)
    }
    assert sparse == {"blocks.0.video.self_attention", "blocks.1.video.self_attention"}


def test_stages_of_few_tokens_stay_dense_to_the_bit(nano_model, load, seen):
    few = sampled(load(nano_model, **(SPARSE | {"dense_below_tokens": 673})))
    assert seen and not any(seen)
    assert torch.equal(few.video_BCFHW, sampled(load(nano_model)).video_BCFHW)


def test_the_same_clip_twice_is_the_same_to_the_bit(nano_model, load, request_for, recipe):
    engine = load(nano_model, dense_above_level=1.0, **SPARSE)
    request = request_for(width=384, height=256, num_frames=49)
    first, again = (engine.render(request, recipe, lambda stage: None) for _ in range(2))
    assert np.array_equal(*(planes_of(clip.frames) for clip in (first, again)))
    assert np.array_equal(first.waveform, again.waveform)


def refused(model, device="cpu", **precision):
    with pytest.raises(UsageError) as caught:
        loading.load_engine(model, PrecisionConfig(**precision), device=device, ops=reference_ops())
    return str(caught.value)


def test_sparse_attention_that_cannot_be_is_refused_before_weights_are_read(nano_model, monkeypatch):
    monkeypatch.setattr(loading, "load_text_encoder", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "must leave one of the 2 layers of nano to block_sparse, got 3 and 3" in refused(
        nano_model, attention="block_sparse"
    )
    assert "for heads of other than (64, 128) channels, got block_sparse for 16" in refused(
        nano_model, "cuda", **SPARSE
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "not of compute capability 9.0, got block_sparse on one of 8.9" in refused(nano_model, "cuda", **SPARSE)


def test_a_gpu_worker_without_the_library_says_what_to_install(monkeypatch):
    def missing(ops, device):
        raise ImportError("No module named 'flash_attn'")

    monkeypatch.setattr(worker_side, "with_block_sparse_attention", missing)
    with pytest.raises(UsageError, match=r"got: No module named 'flash_attn'; install the extra `flash`"):
        worker_side.operations(PrecisionConfig(attention="block_sparse", kernels="reference"), "cuda")
    worker_side.operations(PrecisionConfig(kernels="reference"), "cuda")


def reuse(caplog):
    """(denoiser calls, calls reused) of each stage."""
    lines = [record.facts for record in caplog.records if record.message == "steps reused"]
    return [(facts["denoiser_calls"], facts["calls_reused"]) for facts in lines]


@pytest.mark.parametrize("batch_passes", [True, False], ids=["together", "one by one"])
def test_a_cache_that_never_reuses_gives_the_exact_clip_to_the_bit(nano_model, load, caplog, batch_passes):
    caplog.set_level(logging.INFO, "pipeline.engine")
    stage = replace(GUIDED, schedule=ScheduleConfig(num_steps=3), batch_passes=batch_passes)
    exact = sampled(load(nano_model), stage)
    assert reuse(caplog) == []
    unused = sampled(load(nano_model, step_cache_threshold=1e-12), stage)
    assert reuse(caplog) == [(3 if batch_passes else 12, 0)]
    assert torch.equal(unused.video_BCFHW, exact.video_BCFHW) and torch.equal(unused.audio_BCTM, exact.audio_BCTM)


@pytest.mark.parametrize("batch_passes", [True, False], ids=["together", "one by one"])
def test_a_high_threshold_reuses_and_says_how_often(nano_model, load, caplog, batch_passes):
    caplog.set_level(logging.INFO, "pipeline.engine")
    stage = replace(GUIDED, batch_passes=batch_passes)
    exact, reused = sampled(load(nano_model), stage), sampled(load(nano_model, step_cache_threshold=0.9), stage)
    [(calls, count)] = reuse(caplog)
    assert calls == (20 if batch_passes else 80)
    assert calls // 2 < count <= calls - (1 if batch_passes else 4), "each prediction is computed once at least"
    assert 0 < difference(reused.video_BCFHW, exact.video_BCFHW) < 0.5


def test_a_cache_forgets_between_stages_and_clips(nano_model, load, caplog):
    caplog.set_level(logging.INFO, "pipeline.engine")
    engine = load(nano_model, step_cache_threshold=0.9)
    stage = StageConfig(sigmas=[0.5, 0.0])
    recipe = RecipeConfig(stages=[stage, stage])
    brief = Brief(engine._texts("a red fox", recipe), PIXELS)
    for _ in range(2):
        engine.sample(brief, recipe, seeded_noise(5), lambda stage: None)
    assert reuse(caplog) == [(1, 0)] * 4, "the one step of a stage has none before it"


def test_of_a_long_recipe_more_is_reused_than_of_a_distilled_one(nano_model, load, recipe, caplog):
    """Of the distilled one its first steps, which lie 0.00625 apart; its last three never."""
    caplog.set_level(logging.INFO, "pipeline.engine")
    engine = load(nano_model, step_cache_threshold=0.005)
    sampled(engine, replace(recipe.stages[0], size_factor=1.0))
    sampled(engine, StageConfig(schedule=ScheduleConfig(num_steps=40)))
    (distilled_calls, distilled), (calls, reused) = reuse(caplog)
    assert (distilled_calls, calls) == (8, 40)
    assert distilled <= 4 and reused > 20
