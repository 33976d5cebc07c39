"""What a row may change of a recipe, and what is refused."""

from __future__ import annotations

import pytest

from jobs.entry import compose_recipes
from pipeline.config.recipe import RecipeConfig, StageConfig, resolve, unsupported_overrides

NOTHING = {"num_steps": None, "cfg_scale": None, "stg_scale": None}
# Which overrides each recipe honours.
HONOURED = {
    "distilled_two_stage": set(),
    "distilled_two_stage_short": set(),
    "draft": set(),
    "full_two_stage": {"num_steps", "cfg_scale", "stg_scale"},
    "full_two_stage_hq": {"num_steps", "cfg_scale"},
    "ltxv_multi_scale_dev": set(),
    "ltxv_multi_scale_distilled": set(),
    "ltxv_one_pass": {"num_steps", "cfg_scale", "stg_scale"},
    "one_stage": {"num_steps", "cfg_scale", "stg_scale"},
}


@pytest.fixture(scope="module")
def recipes() -> dict[str, RecipeConfig]:
    return compose_recipes("render", []).usable


def test_every_recipe_says_which_overrides_it_honours(recipes: dict[str, RecipeConfig]) -> None:
    assert set(recipes) == set(HONOURED)
    for name, recipe in recipes.items():
        for override, value in (("num_steps", 12), ("cfg_scale", 2.5), ("stg_scale", 0.5)):
            expected = (
                []
                if override in HONOURED[name]
                else [f"{override} cannot be honoured by recipe {name}, got {value}; leave the column empty"]
            )
            assert unsupported_overrides(recipe, **{**NOTHING, override: value}) == expected


@pytest.mark.parametrize(
    ("override", "value", "rule"),
    [("num_steps", 0, "1 or more"), ("cfg_scale", -1.0, "0 or more"), ("stg_scale", float("nan"), "0 or more")],
)
def test_a_value_without_meaning_is_refused(
    recipes: dict[str, RecipeConfig], override: str, value: float, rule: str
) -> None:
    problems = unsupported_overrides(recipes["one_stage"], **{**NOTHING, override: value})
    assert problems == [f"{override} must be {rule}, got {value}; leave the column empty"]


def test_all_problems_are_told_at_once(recipes: dict[str, RecipeConfig]) -> None:
    assert len(unsupported_overrides(recipes["draft"], num_steps=3, cfg_scale=2.0, stg_scale=1.0)) == 3
    assert unsupported_overrides(recipes["draft"], **NOTHING) == []


def test_overrides_change_the_steps_and_the_pictures_scales_only(recipes: dict[str, RecipeConfig]) -> None:
    before = recipes["full_two_stage"]
    recipe = resolve(before, num_steps=12, cfg_scale=2.5, stg_scale=0.0, negative_prompt="fog")
    first, old = recipe.stages[0], before.stages[0]
    assert len(first.levels(1)) == 13
    assert (first.guidance[0].video.cfg, first.guidance[0].video.stg) == (2.5, 0.0)
    assert first.guidance[0].audio == old.guidance[0].audio
    assert (recipe.negative_prompt, before.negative_prompt == "fog") == ("fog", False)
    assert (recipe.stages[1], recipe.name) == (before.stages[1], before.name)
    assert len(old.levels(1)) == 5, "the recipe itself is as it was"


def test_nothing_asked_for_changes_nothing(recipes: dict[str, RecipeConfig]) -> None:
    for recipe in recipes.values():
        assert resolve(recipe, **NOTHING) == recipe


@pytest.mark.parametrize(
    ("size_factor", "resize", "least"), [(1.0, False, 64), (0.5, True, 128), (0.6666666, True, 128)]
)
def test_a_rendered_side_leaves_two_cells_to_decode(size_factor: float, resize: bool, least: int) -> None:
    stage = StageConfig(size_factor=size_factor, sigmas=[1.0, 0.0])
    recipe = RecipeConfig(name="r", resize=resize, stages=[stage])
    assert recipe.min_side_px == least
    assert recipe.stage_sizes(least, least)[-1] >= (64, 64)
