"""A denoiser spread over ranks predicts what it predicts on one, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.distributed.equality import LAYOUTS, assert_equal_up_to_rounding
from tests.distributed.ranks import Call, Raised, Ranks, loaded, spread_calls

# Name -> recorded call, and how many of its video tokens: all, or a number that parts do not come out even for.
CALLS: dict[str, tuple[str, int | None]] = {
    "batch of two with sound": ("dit_ltx2_0/case_t2v", None),
    "uneven batch of two": ("dit_ltx2_0/case_t2v", 59),
    "distinct timesteps, uneven": ("dit_ltx2_0/case_i2v", 35),
    "fewer tokens than some parts": ("dit_ltx2_0/case_i2v", 5),
    "frozen sound": ("dit_ltx2_0/case_frozen_audio", 58),
    "attention and text masks": ("dit_ltx2_0/case_masked", None),
    "attention and text masks, uneven": ("dit_ltx2_0/case_masked", 57),
    "perturbed and isolated samples": ("dit_ltx2_0/case_stg", None),
    "video alone": ("dit_ltx2_0/case_video_only", 35),
    "sound alone": ("dit_ltx2_0/case_audio_only", None),
    "gated heads, modulated text": ("dit_ltx2_3/case_t2v", 59),
    "gated heads, perturbed": ("dit_ltx2_3/case_stg", 35),
    "marked keyframes": ("dit_ltx2_5/case_i2v", 35),
    "a model without sound": ("dit_ltx2_0_video_model/case_t2v", None),
    "LTX-Video": ("dit_ltxv_0_9_8_2b/case_t2v", None),
    "LTX-Video, held tokens": ("dit_ltxv_0_9_8_2b/case_i2v", 31),
    "LTX-Video, attention skipped": ("dit_ltxv_0_9_8_2b/case_stg_attentionskip", None),
    "LTX-Video, block skipped": ("dit_ltxv_0_9_8_2b/case_stg_transformerblock", 31),
}
SEQUENCE_LAYOUTS = [layout for layout in LAYOUTS if "ring" in layout or "ulysses" in layout]


@pytest.fixture(scope="session")
def calls(call: Callable[..., Call]) -> dict[str, Call]:
    return {name: call(recorded, num_tokens) for name, (recorded, num_tokens) in CALLS.items()}


@pytest.fixture(scope="session")
def answers(ranks: Ranks, calls: dict[str, Call]) -> Callable[[str], list[Any]]:
    return cache(lambda layout: ranks.run(layout, spread_calls, calls))


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_every_rank_has_the_velocities_of_one(
    layout: str, name: str, calls: dict[str, Call], answers: Callable[[str], list[Any]]
) -> None:
    single = calls[name].velocities(loaded(calls[name].model))
    for answer in answers(layout):
        assert not isinstance(answer, Raised), answer
        assert_equal_up_to_rounding(answer[name], single)
