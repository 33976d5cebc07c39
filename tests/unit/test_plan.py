"""What the planner makes of rows under real recipes: the verdict on a row's numbers."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.planning.estimate import Estimator
from pipeline.planning.intake import Intake
from pipeline.planning.plan import Planner
from tests.unit.makers import LIMITS


def guided(**stage: Any) -> RecipeConfig:
    guidance = [GuidanceConfig(video=StreamGuidance(cfg=3.0, stg=1.0), stg_blocks=[1])]
    return RecipeConfig(
        "guided", stages=[StageConfig(schedule=ScheduleConfig(num_steps=4), guidance=guidance, **stage)]
    )


def planner(recipe: RecipeConfig) -> Planner:
    return Planner(
        recipes={recipe.name: recipe},
        default_recipe=recipe.name,
        precision=PrecisionConfig(),
        fingerprint="f",
        limits=LIMITS,
        estimator=Estimator(DenoiserSize(), 400.0, UnitPrice("p", Decimal("3.6"))),
    )


def judged(recipe: RecipeConfig, **row: Any) -> Intake:
    return planner(recipe).intake([{"id": "a", "prompt": "a boat", **row}, {"id": "b", "prompt": "a boat"}])


@pytest.mark.parametrize(
    ("recipe", "row", "message"),
    [
        (
            guided(),
            {"cfg_scale": 1.0, "negative_prompt": "fog"},
            "negative_prompt must be empty where cfg_scale 1 leaves it without effect, got 'fog'",
        ),
        (
            guided(sampler="euler_cfg_pp"),
            {"cfg_scale": 1.0},
            "the row's numbers cannot be honoured by recipe guided: recipe.stages.sampler must be another one",
        ),
    ],
)
def test_values_that_do_not_go_together_are_a_problem_of_their_row_alone(
    recipe: RecipeConfig, row: dict[str, Any], message: str
) -> None:
    intake = judged(recipe, **row)
    assert [request.id for request in intake.requests] == ["b"]
    assert message in intake.rejections[0].message
    assert planner(recipe).item(intake.requests[0]).key


@pytest.mark.parametrize("row", [{"cfg_scale": 1.0}, {"cfg_scale": 2.0, "negative_prompt": "fog"}])
def test_a_scale_without_a_prompt_to_steer_from_is_no_problem(row: dict[str, Any]) -> None:
    assert len(judged(guided(), **row).requests) == 2


def test_a_negative_prompt_still_counts_where_the_sound_is_guided_by_it() -> None:
    recipe = guided()
    recipe.stages[0].guidance[0].audio.cfg = 7.0
    assert len(judged(recipe, cfg_scale=1.0, negative_prompt="fog").requests) == 2
