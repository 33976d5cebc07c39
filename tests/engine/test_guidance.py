"""Guidance: the formulas against the reference, and which predictions are computed at all."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.guidance import (
    ISOLATED,
    NEGATIVE,
    PERTURBED,
    POSITIVE,
    GuidanceConfig,
    StreamGuidance,
)
from pipeline.config.recipe import StageConfig
from pipeline.engine.guidance import guided

RECORDED = {POSITIVE: "cond", NEGATIVE: "uncond_text", PERTURBED: "perturbed", ISOLATED: "isolated_modality"}
KINDS = ("cfg3", "cfg4_stg1", "cfg3_rescale0.7", "ltx2_video_default", "ltx2_audio_default", "modality3")


@pytest.fixture(scope="module")
def case(golden):
    return golden("schedulers/case_guidance")


def predictions(case, names):
    return {name: case[f"in.{RECORDED[name]}"] for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_trap_14_combined_prediction_is_the_references(case, kind):
    assert set(case.params["multimodal"]) == set(KINDS)
    scales = {name.removesuffix("_scale"): value for name, value in case.params["multimodal"][kind].items()}
    stream = StreamGuidance(**scales)
    passes = GuidanceConfig(video=stream, stg_blocks=[0]).passes(has_audio=True)
    case.assert_close(f"out.multimodal.{kind}", guided(predictions(case, passes), stream))


def test_trap_28_cfg_star_scales_the_negative_prediction_first(case):
    delta = guided(predictions(case, (POSITIVE, NEGATIVE)), StreamGuidance(cfg=3.0), cfg_star=True) - case["in.cond"]
    case.assert_close("out.delta.cfg_star3", delta)


def test_scale_of_one_guidance_alone_is_the_references(case):
    positive = case["in.cond"]
    delta = guided(predictions(case, (POSITIVE, NEGATIVE)), StreamGuidance(cfg=3.0)) - positive
    case.assert_close("out.delta.cfg3", delta)
    delta = guided(predictions(case, (POSITIVE, PERTURBED)), StreamGuidance(stg=1.5)) - positive
    case.assert_close("out.delta.stg1.5", delta)


@pytest.mark.parametrize(
    ("video", "audio", "passes"),
    [
        ({}, {}, (POSITIVE,)),
        ({"rescale": 0.7}, {}, (POSITIVE,)),
        ({"cfg": 3.0}, {}, (POSITIVE, NEGATIVE)),
        ({}, {"cfg": 7.0}, (POSITIVE, NEGATIVE)),
        ({"stg": 1.0}, {}, (POSITIVE, PERTURBED)),
        ({"modality": 3.0}, {}, (POSITIVE, ISOLATED)),
        ({"cfg": 0.0, "stg": 1.0, "modality": 3.0}, {}, (POSITIVE, NEGATIVE, PERTURBED, ISOLATED)),
    ],
)
def test_predictions_that_no_scale_uses_are_not_asked_for(video, audio, passes):
    guidance = GuidanceConfig(video=StreamGuidance(**video), audio=StreamGuidance(**audio), stg_blocks=[0])
    assert guidance.passes(has_audio=True) == passes


def test_a_model_without_sound_asks_for_nothing_on_its_behalf():
    both = GuidanceConfig(video=StreamGuidance(modality=3.0), audio=StreamGuidance(cfg=7.0))
    assert both.passes(has_audio=False) == (POSITIVE,)


def test_trap_28_the_first_entry_at_or_below_a_level_counts_and_the_last_below_all():
    cfgs = {1.0: 1.0, 0.98: 6.0, 0.93: 8.0, 0.7: 2.0}
    guidance = [GuidanceConfig(down_to=level, video=StreamGuidance(cfg=cfg)) for level, cfg in cfgs.items()]
    stage = StageConfig(sigmas=[1.0, 0.0], guidance=guidance)
    levels = (1.0, 0.99, 0.98, 0.95, 0.8, 0.7, 0.2)
    assert [stage.guidance_at(level).video.cfg for level in levels] == [1.0, 6.0, 6.0, 8.0, 2.0, 2.0, 2.0]
    assert StageConfig(sigmas=[1.0, 0.0]).guidance_at(0.5) is None


def test_rescaling_takes_back_all_of_the_added_spread_at_1():
    positive, negative = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    result = guided({POSITIVE: positive, NEGATIVE: negative}, StreamGuidance(cfg=5.0, rescale=1.0))
    torch.testing.assert_close(result.std(), positive.std())
