"""All rows are judged before the first is rendered."""

from __future__ import annotations

from typing import Any

from pipeline.planning.intake import Intake, admit_rows
from tests.unit.makers import LIMITS, RECIPES


def admit(*rows: dict[str, Any]) -> Intake:
    return admit_rows(rows, recipes=RECIPES, default_recipe="two_stage", limits=LIMITS)


def test_a_bad_row_does_not_stop_the_others() -> None:
    intake = admit(
        {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", "num_frames": 120}, {"id": "c", "prompt": "x"}
    )
    assert [request.id for request in intake.requests] == ["a", "c"]
    assert [rejection.message for rejection in intake.rejections] == [
        'row 1 (id "b"): num_frames must be 8k+1, got 120; use 113 or 121'
    ]


def test_all_rows_that_share_an_id_are_rejected() -> None:
    intake = admit(*({"id": id, "prompt": "x"} for id in ("a", "b", "a", "a")))
    assert [request.id for request in intake.requests] == ["b"]
    assert [rejection.row_index for rejection in intake.rejections] == [0, 2, 3]
    assert "id must be unique, got 'a' in rows 2, 3 too" in intake.rejections[0].message


def test_a_duplicate_that_is_bad_in_other_ways_lists_both() -> None:
    intake = admit({"id": "a", "prompt": "x"}, {"id": "a", "prompt": ""})
    assert "prompt must not be blank" in intake.rejections[1].message
    assert "id must be unique" in intake.rejections[1].message


def test_blank_ids_are_blank_and_not_duplicates() -> None:
    intake = admit({"id": "", "prompt": "x"}, {"id": None, "prompt": "x"})
    assert all("blank" in r.message and "unique" not in r.message for r in intake.rejections)
