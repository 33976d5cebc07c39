"""Engines with a denoiser in shares render what one engine does, and plan with the bytes of a share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from kernels.ops import reference_ops
from pipeline.accord import alone
from pipeline.assembly import worker_side
from pipeline.config.model import DenoiserSize, ModelConfig, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.engine import loading
from pipeline.engine.engine import DENOISER
from pipeline.engine.memory import PHASES
from pipeline.engine.nano import CHECKPOINT, DISTILLED_ADAPTER, SPATIAL_UPSCALER, TEXT_ENCODER
from pipeline.parallel.layout import RankGroups
from pipeline.records.request import RenderRequest
from tests.distributed.ranks import Raised, Ranks
from tests.distributed.tensor_ranks import sharding_of
from tests.engine.pictures import planes_of

RECIPE = RecipeConfig(
    name="two_stage",
    stages=[
        StageConfig(size_factor=0.5, sigmas=[1.0, 0.725, 0.0]),
        StageConfig(upsample=2.0, sigmas=[0.909375, 0.421875, 0.0], adapter="distilled"),
    ],
)
REQUEST = RenderRequest(id="clip", row_index=0, prompt="a red fox", seed=1, width=64, height=64, num_frames=9, fps=24.0,
                        recipe="two_stage", grid_px=64)  # fmt: skip
ENOUGH_BYTES = 10**12


def render(groups: RankGroups | None, model: ModelConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """Frames, sound, and the bytes of the denoiser's weights that the memory plan counts with."""
    budget = loading.MemoryBudget(ENOUGH_BYTES, [dict.fromkeys(PHASES, 0)])
    sharding = None if groups is None else sharding_of(groups)
    with mock.patch.object(loading, "plan_for_most", wraps=loading.plan_for_most) as plan:
        engine = loading.load_engine(
            model, PrecisionConfig(torch_threads=1), device="cpu", ops=reference_ops(), budget=budget, sharding=sharding
        )
    planned_bytes = next(part.weight_bytes for part in plan.call_args.args[0] if part.name == DENOISER)
    clip = engine.render(REQUEST, RECIPE, lambda *_: None)
    return planes_of(clip.frames), np.asarray(clip.waveform), planned_bytes


@pytest.fixture
def nano(model: Callable[[str], Path]) -> Any:
    return ModelConfig(
        folder=str(model("nano").parent),
        checkpoint=CHECKPOINT,
        text_encoder=TEXT_ENCODER,
        spatial_upscaler=SPATIAL_UPSCALER,
        adapters={"distilled": DISTILLED_ADAPTER},
        size=DenoiserSize(2, 64, 32, 128, num_heads=4, num_audio_heads=4),
    )


def test_engines_with_a_share_each_render_the_clip_of_one(ranks: Ranks, nano: ModelConfig) -> None:
    frames, waveform, whole_bytes = render(None, nano)
    for answer in ranks.run("tensor2", render, nano):
        assert not isinstance(answer, Raised), answer
        got_frames, got_waveform, planned_bytes = answer
        # A float32 rounding may carry a pixel over the edge between two levels.
        difference = np.abs(got_frames.astype(int) - frames.astype(int))
        assert difference.max() <= 1 and difference.mean() <= 0.01
        assert np.abs(got_waveform - waveform).max() <= 1e-3 * np.abs(waveform).max()
        assert planned_bytes < 0.8 * whole_bytes


def hands_out_frames(groups: RankGroups, model: ModelConfig) -> bool:
    cluster = SimpleNamespace(gpu_memory_limit_gb=None)
    job = SimpleNamespace(model=model, precision=PrecisionConfig(torch_threads=1), cluster=cluster)
    brief: Any = SimpleNamespace(job=job, device="cpu")
    return worker_side._load(brief, groups.layout, groups, alone).hands_out_frames


def test_only_the_rank_that_leads_brings_pictures_to_the_host(ranks: Ranks, nano: ModelConfig) -> None:
    assert ranks.run("ulysses2", hands_out_frames, nano) == [True, False]
