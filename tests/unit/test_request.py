"""Rows to requests: defaults, lossless casts, and every problem of a bad row in one message."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from pipeline.errors import InvalidRequest
from pipeline.records.request import parse_request, seed_from_id
from pipeline.records.wishes import NO_WISHES, AdapterUse, Wishes
from pipeline.records.work import content_key, file_stem
from tests.unit.makers import LIMITS, RECIPES, parse


def problems(**row: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidRequest) as caught:
        parse(**row)
    return caught.value.problems


def test_a_row_with_only_id_and_prompt_takes_the_recipes_clip() -> None:
    request = parse(id="shot", prompt="a boat")
    assert (request.width, request.height, request.num_frames, request.fps) == (192, 128, 25, 24.0)
    assert request.seed == seed_from_id("shot") == parse(id="shot", prompt="other").seed
    assert 0 <= request.seed < 2**63


def test_whole_numbers_in_double_columns_are_taken() -> None:
    request = parse(width=256.0, num_frames=33.0, seed=Decimal(2**53 + 1))
    assert (request.width, request.num_frames, request.seed) == (256, 33, 2**53 + 1)


def test_a_duration_becomes_frames_on_the_grid() -> None:
    assert parse(duration_s=25 / 24).num_frames == 25
    assert parse(duration_s=2.0).num_frames == 49


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": " "}, "id must not be blank"),
        ({"prompt": " \n"}, "prompt must not be blank"),
        ({"prompt": None}, "prompt must not be blank"),
        ({"width": 191}, "width must be even and at least 2, got 191; use 192"),
        ({"height": 0}, "height must be even and at least 2, got 0; use 2"),
        ({"width": 100.5}, "width must be a whole number, got 100.5"),
        ({"width": math.nan}, "width must be a whole number, got nan"),
        ({"width": 5_000_000_000}, "width must be at most 4096, got 5000000000"),
        ({"num_frames": 120}, "num_frames must be 8k+1, got 120; use 113 or 121"),
        ({"num_frames": -7}, "num_frames must be 8k+1, got -7; use 1"),
        ({"num_frames": 0}, "num_frames must be 8k+1, got 0; use 1"),
        ({"num_frames": 481, "fps": 4.0}, "a clip must last at most 20 s, got 481 frames at 4 fps"),
        ({"duration_s": -1.0}, "duration_s must be a finite number above 0, got -1.0"),
        ({"duration_s": math.nan}, "duration_s must be a finite number above 0, got nan"),
        ({"duration_s": 21.0}, "a clip must last at most 20 s, got 21 s"),
        ({"duration_s": 2.0, "num_frames": 25}, "num_frames and duration_s must agree"),
        ({"fps": 0.0}, "fps must be a finite number above 0, got 0.0; use 24"),
        ({"fps": math.inf}, "fps must be a finite number above 0, got inf"),
        ({"fps": 1000.0}, "fps must be between 1 and 240, got 1000; use 24"),
        ({"num_frames": 1, "fps": 1e-6}, "fps must be between 1 and 240, got 1e-06"),
        ({"num_frames": 25, "fps": 1e-310}, "fps must be between 1 and 240"),
        ({"duration_s": 1e300}, "a clip must last at most 20 s, got 1e+300 s"),
        ({"seed": Decimal("2.5")}, "seed must be a whole number, got 2.5"),
        ({"num_frames": 1, "fps": 120.0}, "long enough for one sound latent"),
        ({"seed": 2.5}, "seed must be a whole number, got 2.5"),
        ({"priority": 2**40}, "priority must be between"),
        ({"recipe": "nope"}, "recipe must be one of no_crop, two_stage, got 'nope'"),
        ({"recipe": "no_crop", "width": 200}, "a multiple of 64 with recipe.crop=false, got 200; use 192 or 256"),
        ({"images": [{"uri": "x"}]}, "images is not supported by recipe two_stage, got"),
        ({"audio": {"uri": "x"}}, "audio is not supported by recipe two_stage, got"),
        ({"loras": [{"uri": "x"}]}, "loras[0].uri must be an adapter that fits the model, got 'x'"),
        ({"scenes": [{"prompt": "x"}]}, "scenes is not supported by recipe two_stage, got"),
        ({"camera": "dolly_in"}, "camera must be one of none with this model, got 'dolly_in'"),
        ({"enhance_prompt": True}, "enhance_prompt must be false: the model's text encoder cannot write"),
        ({"negative_prompt": "blur"}, "negative_prompt is not supported by recipe two_stage, got 'blur'"),
        ({"num_steps": 4}, "num_steps is not supported by recipe two_stage, got"),
        ({"cfg_scale": 0.0}, "cfg_scale is not supported by recipe two_stage, got"),
    ],
)  # fmt: skip
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    found = problems(**row)
    assert len(found) == 1
    assert message in found[0]


def test_every_problem_of_a_row_is_listed_at_once() -> None:
    found = problems(prompt="", width=191, num_frames=120, fps=math.nan, images=[{"uri": "x"}])
    assert len(found) == 5


def test_task_columns_that_ask_for_nothing_are_fine() -> None:
    nothing = {"uri": None, "strength": None}
    assert parse(images=[], audio=nothing, enhance_prompt=False, camera="", loras=None).id == "row-0"


def test_tags_become_sorted_pairs_of_text() -> None:
    assert parse(tags=[("b", "2"), (1, 1.5), ("c", None)]).tags == (("1", "1.5"), ("b", "2"))
    assert parse(tags={"a": 1}).tags == (("a", "1"),)


def _key(**row: Any) -> str:
    return content_key(parse(**row), recipe={"stages": [1]}, precision={"linear": "exact"}, model={"fingerprint": "f"})


def test_the_content_key_is_of_pixels_and_sound_only() -> None:
    base = _key(id="a", seed=1)
    assert base == _key(id="b", seed=1, priority=3, tags={"k": "v"}, row_index=9)
    assert len(base) == 64
    changes = ({"prompt": "a ship"}, {"width": 256}, {"height": 64}, {"num_frames": 33}, {"fps": 25.0}, {"seed": 2})
    others = [_key(id="a", **{"seed": 1, **change}) for change in changes]
    assert len({base, *others}) == len(others) + 1


def test_a_file_name_is_safe_whatever_the_id() -> None:
    assert file_stem("shot-7", "ab" * 32) == "shot-7.abababababab"
    assert file_stem("../étude 1/b", "0" * 64) == "_etude_1_b.000000000000".replace("e", "_", 1)
    assert len(file_stem("x" * 500, "0" * 64)) <= 140


@pytest.mark.parametrize(
    ("row", "wishes", "key"),
    [
        ({}, NO_WISHES, "618d95233d3c5fa02c6c6dd509db1e03e4a0a84b6e21d7d6f7e424b68e3b705e"),
        (
            {"prompt": 'Größe "x"\\ \n雪 \u2028', "seed": -5},
            NO_WISHES,
            "06777283d38fe071ec3f4dbf50edcb9a2bf1bac6b2b3bb4cbfd658005e9ac562",
        ),
        (
            {"fps": 29.97, "num_frames": 33, "seed": 2**62},
            NO_WISHES,
            "7abdaa644a97d4a89a97a49bbb3f5e98ec90702be63e2faaa18db044cc3f4068",
        ),
        (
            {"width": 126},
            Wishes("rain", 5, None, None, True, (AdapterUse("/a", "a" * 64, 0.5), AdapterUse("/b", "b" * 64, -1.0))),
            "9b56d3d44f98fd103894a3ce05490e622cc1593b5044eacdb556d3373494babe",
        ),
    ],
)
def test_the_key_of_a_clip_never_changes_by_itself(row: dict[str, Any], wishes: Wishes, key: str) -> None:
    """Another key for the same clip renders everything again. If the pictures changed, raise RENDER_REVISION."""
    request = replace(parse(**row), wishes=wishes)
    recipe = {"stages": [{"sigmas": [1.0, 0.725, 0.0]}], "adapters": {"distilled": "d" * 64}, "negative_prompt": "fog"}
    precision, model = {"linear": "exact", "torch_threads": 2}, {"fingerprint": "f" * 64, "text_tokens": 1024}
    assert content_key(request, recipe=recipe, precision=precision, model=model) == key


def test_a_row_that_is_like_one_before_is_judged_as_if_it_were_the_first() -> None:
    rules: dict[str, Any] = {"recipes": RECIPES, "default_recipe": "two_stage", "limits": LIMITS}
    forms: dict[Any, Any] = {}
    rows = [
        {"id": "a", "prompt": "x", "width": 126, "tags": [("k", "v")]},
        {"id": "b", "prompt": "y", "width": 126, "seed": 3, "priority": 2},
        {"id": "c", "prompt": "z", "width": 126.0, "loras": [], "images": None},
        {"id": "d", "prompt": "z", "width": 128, "recipe": "no_crop"},
        {"id": "e", "prompt": "z", "width": 126},
    ]
    for index, row in enumerate(rows):
        alone = parse_request(row, row_index=index, **rules)
        assert parse_request(row, row_index=index, forms=forms, **rules) == alone
    with pytest.raises(InvalidRequest) as refused:
        parse_request({"id": "", "prompt": " ", "width": 126, "seed": 0.5}, row_index=9, forms=forms, **rules)
    assert [problem.split()[0] for problem in refused.value.problems] == ["id", "prompt", "seed"]
    with pytest.raises(InvalidRequest, match="multiple of 64"):
        parse_request({"id": "f", "prompt": "z", "width": 126, "recipe": "no_crop"}, row_index=9, forms=forms, **rules)
