"""What a row wishes beyond prompt and shape: honoured by the recipes and models that can, refused by the others."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.errors import InvalidRequest, UsageError
from pipeline.records.request import RecipeRules, RenderRequest, RequestLimits, parse_request
from pipeline.records.wishes import AdapterUse, ModelRules
from pipeline.records.work import content_key

GUIDED = RecipeRules("guided", 192, 128, 25, 24.0, 64, True, negative_prompt="blurry",
                     honours=frozenset({"num_steps", "cfg_scale", "stg_scale"}))  # fmt: skip
PLAIN = RecipeRules("plain", 192, 128, 25, 24.0, 64, True)


def sha256(uri: str) -> str:
    if "missing" in uri:
        raise UsageError("no such file")
    return f"hash of {uri}"


MODEL = ModelRules(cameras={"dolly_in": "cams/in.safetensors"}, can_enhance=True, adapter_sha256=sha256)


def parse(model: ModelRules = MODEL, **row: Any) -> RenderRequest:
    return parse_request(
        {"id": "a", "prompt": "a boat", **row},
        row_index=0,
        recipes={"guided": GUIDED, "plain": PLAIN},
        default_recipe="guided",
        limits=RequestLimits(4096, 20.0),
        model=model,
    )


def problem(**row: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(**row)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_a_clip_too_short_for_sound_is_fine_where_there_is_none() -> None:
    assert parse(ModelRules(has_audio=False), num_frames=1, fps=120.0).num_frames == 1


def test_a_guided_recipe_gives_its_negative_prompt_and_a_row_may_give_another() -> None:
    assert parse().wishes.negative_prompt == "blurry"
    assert parse(negative_prompt="grey").wishes.negative_prompt == "grey"
    assert parse(recipe="plain").wishes.negative_prompt == ""


def test_overrides_are_taken_where_the_recipe_has_such_numbers() -> None:
    wishes = parse(num_steps=12.0, cfg_scale=0.0, stg_scale=1).wishes
    assert (wishes.num_steps, wishes.cfg_scale, wishes.stg_scale) == (12, 0.0, 1.0)
    assert "num_steps is not supported by recipe plain, got 12" in problem(recipe="plain", num_steps=12)


def test_loras_come_in_order_and_the_camera_last() -> None:
    loras = [{"uri": "b", "strength": 0.5}, {"uri": "a", "strength": None}]
    assert parse(loras=loras, camera="dolly_in").wishes.adapters == (
        AdapterUse("b", "hash of b", 0.5),
        AdapterUse("a", "hash of a", 1.0),
        AdapterUse("cams/in.safetensors", "hash of cams/in.safetensors", 1.0),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"loras": [{"uri": "missing"}]},
            "loras[0].uri must be an adapter that fits the model, got 'missing': no",
        ),
        ({"loras": ["x"]}, "loras[0] must be a struct with a uri, got 'x'"),
        ({"loras": [{"strength": 1.0}]}, "loras[0] must be a struct with a uri"),
        ({"loras": [{"uri": "a", "strength": math.nan}]}, "loras[0].strength must be between -10 and 10, got nan"),
        ({"loras": [{"uri": "a", "strength": "much"}]}, "loras[0].strength must be between -10 and 10, got 'much'"),
        ({"camera": "pan"}, "camera must be one of dolly_in, got 'pan'"),
        ({"num_steps": 0}, "num_steps must be a whole number from 1 to 1000, got 0"),
        ({"num_steps": 2.5}, "num_steps must be a whole number from 1 to 1000, got 2.5"),
        ({"cfg_scale": math.inf}, "cfg_scale must be a finite number, 0 or more, got inf"),
        ({"stg_scale": -1.0}, "stg_scale must be a finite number, 0 or more, got -1.0"),
    ],
)
def test_a_wish_that_cannot_be_honoured_is_a_problem_of_the_row(row: dict[str, Any], message: str) -> None:
    assert message in problem(**row)


def _key(**row: Any) -> str:
    return content_key(parse(**row), recipe={}, precision={}, model={})


def test_wishes_are_part_of_the_content_and_places_of_files_are_not() -> None:
    changes: list[dict[str, Any]] = [{"enhance_prompt": True}, {"camera": "dolly_in"}, {"loras": [{"uri": "a"}]},
                                     {"loras": [{"uri": "a", "strength": 0.5}]}]  # fmt: skip
    assert len({_key(), *(_key(**change) for change in changes)}) == len(changes) + 1
    request = parse(loras=[{"uri": "a"}])
    assert "uri" not in str(request.pixel_content()) and "hash of a" in str(request.pixel_content())
