"""Rows to requests: defaults, lossless casts, and every problem of a bad row in one message."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest

from pipeline.errors import InvalidRequest
from pipeline.records.request import seed_from_id
from pipeline.records.work import content_key, file_stem
from tests.unit.makers import parse


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
