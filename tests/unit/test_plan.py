"""What the planner makes of rows under real recipes: the verdict on their numbers, and their content keys."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import DenoiserSize, ModelConfig, PrecisionConfig
from pipeline.config.recipe import DecodeConfig, RecipeConfig, StageConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.planning.estimate import Estimator
from pipeline.planning.intake import Intake
from pipeline.planning.plan import Planner
from pipeline.planning.spread import Machine
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
        model=ModelConfig(),
        fingerprint="f",
        limits=LIMITS,
        estimator=Estimator(DenoiserSize(), Machine(400.0, 249.0), UnitPrice("p", Decimal("3.6"))),
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


def test_a_recipe_that_the_jobs_settings_do_not_go_with_is_a_problem_of_the_rows_that_name_it() -> None:
    planning = replace(planner(guided()), unusable={"draft": "sound_from_stage must be 1"})
    rows = [{"id": "a", "prompt": "a boat", "recipe": "draft"}, {"id": "b", "prompt": "a boat"}]
    intake = planning.intake(rows)
    assert [request.id for request in intake.requests] == ["b"]
    message = "recipe must suit the job's model and settings, got 'draft': sound_from_stage must be 1; use guided"
    assert message in intake.rejections[0].message


PLAIN = RecipeConfig("plain", stages=[StageConfig(sigmas=[1.0, 0.0])])
LTX_VIDEO = RecipeConfig("video", stages=[StageConfig(sigmas=[1.0, 0.0], family="ltx_video")])


def key(planning: Planner, **row: Any) -> str:
    (request,) = planning.intake([{"id": "a", "prompt": "a boat", **row}]).requests
    return planning.item(request).key


def test_a_row_that_says_what_its_recipe_says_anyway_is_the_same_clip() -> None:
    planning = planner(guided())
    same = {"num_steps": 4, "cfg_scale": 3.0, "stg_scale": 1.0, "negative_prompt": guided().negative_prompt}
    assert key(planning, **same) == key(planning)
    others: list[dict[str, Any]] = [
        {"num_steps": 5}, {"cfg_scale": 2.0}, {"stg_scale": 0.5}, {"negative_prompt": "fog"},
    ]  # fmt: skip
    assert len({key(planning), *(key(planning, **other) for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("planning", "changed"),
    [
        (planner(PLAIN), {"model": ModelConfig(size=DenoiserSize(text_tokens=512))}),
        (planner(PLAIN), {"model": ModelConfig(exchange_timesteps="1.0.0")}),
        (planner(PLAIN), {"fingerprint": "g"}),
        (planner(PLAIN), {"precision": PrecisionConfig(linear="fp8")}),
        (planner(guided()), {"recipes": {"guided": replace(guided(), negative_prompt="fog")}}),
        (planner(PLAIN), {"recipes": {"plain": replace(PLAIN, decode=DecodeConfig(tone_map=0.5))}}),
        (planner(LTX_VIDEO), {"recipes": {"video": replace(LTX_VIDEO, decode=DecodeConfig(noise_scale=0.5))}}),
    ],
)
def test_what_changes_the_clip_changes_its_key(planning: Planner, changed: dict[str, Any]) -> None:
    assert key(replace(planning, **changed)) != key(planning)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": ModelConfig(name="other", folder="/elsewhere")},
        {"precision": PrecisionConfig(name="mine", keep_first_blocks=1)},
        {"recipes": {"copy": replace(PLAIN, name="copy", negative_prompt="fog")}, "default_recipe": "copy"},
        {"recipes": {"plain": replace(PLAIN, decode=DecodeConfig(noise_scale=0.5))}},
    ],
)
def test_what_changes_nothing_of_the_clip_is_not_in_its_key(changed: dict[str, Any]) -> None:
    planning = planner(PLAIN)
    assert key(replace(planning, **changed)) == key(planning)


def test_the_blocks_that_keep_their_numbers_count_where_the_others_do_not() -> None:
    fp8 = replace(planner(PLAIN), precision=PrecisionConfig(linear="fp8"))
    assert key(replace(fp8, precision=PrecisionConfig(linear="fp8", keep_first_blocks=1))) != key(fp8)


def test_rows_of_many_kinds_planned_together_get_the_keys_and_estimates_they_get_alone() -> None:
    wishes: list[dict[str, Any]] = [{}, {"cfg_scale": 2.0}, {"num_steps": 5}, {"cfg_scale": -0.0}, {"cfg_scale": 0.0}]
    rows = [
        {"id": f"{size}-{seed}-{number}", "prompt": f"boat {size}", "width": size, "seed": seed, **wish}
        for number, wish in enumerate(wishes)
        for size in (64, 66, 128)
        for seed in (1, 2)
    ]
    together = planner(guided())
    items = [together.item(request) for request in together.intake(rows).requests]
    alone = [planner(guided()).item(planner(guided()).intake([row]).requests[0]) for row in rows]
    assert [(item.key, item.estimate) for item in items] == [(item.key, item.estimate) for item in alone]
    # Zero is zero, whatever its sign.
    assert len({item.key for item in items}) == len(rows) - 3 * 2
