"""What ranks of a gang do about an item that one of them will not start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import rendering
from pipeline.accord import CANCELLED
from pipeline.cluster.assignment import Assignment
from pipeline.rendering import Renderer
from tests.unit.makers import item


def renderer(consent: Any) -> Renderer:
    return Renderer(cast(Any, None), {}, Path(), consent)


def test_a_rank_that_waits_to_refuse_an_item_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "BEAT_EVERY_S", 0.01)
    others_come = threading.Event()

    def consent(vote: int) -> int:
        others_come.wait(5)
        return vote

    this, assignment = renderer(consent), Assignment(item(0), lambda outcome: None)
    accord = this.accord_on(assignment, lambda stage: None)
    waiting = threading.Thread(target=this.refuse, args=(assignment, accord, CANCELLED))
    waiting.start()
    while assignment.last_beat.count < 3 and waiting.is_alive():
        pass
    others_come.set()
    waiting.join()
    assert assignment.last_beat.count >= 3 and assignment.last_beat.stage == "wait"


def test_a_gang_that_cannot_vote_any_more_keeps_nobody_from_answering() -> None:
    def consent(vote: int) -> int:
        raise RuntimeError("connection closed by peer")

    this, assignment = renderer(consent), Assignment(item(0), lambda outcome: None)
    this.refuse(assignment, this.accord_on(assignment, lambda stage: None), CANCELLED)
