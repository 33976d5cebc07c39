"""A whole stage, spread over ranks by tokens and by predictions, ends where it ends on one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import StageConfig
from pipeline.geometry import LatentShape
from tests.distributed.equality import LAYOUTS, assert_equal_up_to_rounding
from tests.distributed.ranks import Clip, Raised, Ranks, loaded, spread_clips

# 63 tokens, which come out even for no layout of 2 or 4; a picture adds 21.
SHAPE = LatentShape(3, 3, 7, 9, 24.0)
SIGMAS = [1.0, 0.8, 0.4, 0.0]
BOTH = StreamGuidance(cfg=3.0, stg=1.0, rescale=0.7)
THREE_PASSES = GuidanceConfig(video=BOTH, audio=BOTH, stg_blocks=[1])
FOUR_PASSES = GuidanceConfig(
    video=BOTH, audio=StreamGuidance(cfg=7.0, stg=1.0, modality=3.0, rescale=0.7), stg_blocks=[1]
)
# The first step is unguided, so it has one prediction for all ranks.
FALLING = [GuidanceConfig(down_to=0.9), THREE_PASSES]
LTX_VIDEO = {"family": "ltx_video", "stg_strategy": "attention", "cfg_star": True}

STAGES: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, float], ...]]] = {
    "unguided": ("dit_ltx2_0", {}, ()),
    "four predictions": ("dit_ltx2_0", {"guidance": [FOUR_PASSES]}, ()),
    "three predictions, one by one": ("dit_ltx2_0", {"guidance": [THREE_PASSES], "batch_passes": False}, ()),
    "held pictures, one step unguided": ("dit_ltx2_3", {"guidance": FALLING}, ((0, 1.0), (16, 0.6))),
    "nano": ("nano", {"guidance": FALLING}, ((0, 1.0),)),
    "fresh noise in every step": ("dit_ltx2_0", {"sampler": "res_2s"}, ()),
    "LTX-Video": ("dit_ltxv_0_9_8_2b", {"guidance": [THREE_PASSES], **LTX_VIDEO}, ((0, 0.9),)),
}


@pytest.fixture(scope="session")
def clips(model: Callable[[str], Path]) -> dict[str, Clip]:
    return {
        name: Clip(model(folder), StageConfig(sigmas=SIGMAS, **stage), SHAPE, pictures)
        for name, (folder, stage, pictures) in STAGES.items()
    }


@pytest.fixture(scope="session")
def single(clips: dict[str, Clip]) -> Callable[[str], Any]:
    return cache(lambda name: clips[name].denoised(loaded(clips[name].model)))


@pytest.fixture(scope="session")
def answers(ranks: Ranks, clips: dict[str, Clip]) -> Callable[[str], list[Any]]:
    return cache(lambda layout: ranks.run(layout, spread_clips, clips))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STAGES)
def test_every_rank_ends_where_one_does(
    layout: str, name: str, single: Callable[[str], Any], answers: Callable[[str], list[Any]]
) -> None:
    for answer in answers(layout):
        assert not isinstance(answer, Raised), answer
        assert_equal_up_to_rounding(answer[name], single(name))
