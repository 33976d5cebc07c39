"""An attempt in its worker's hands: signs of life, the request to give it up, and its one end."""

from __future__ import annotations

import time

import pytest

from pipeline.cluster.assignment import Assignment, Beat
from pipeline.errors import Cancelled
from pipeline.records.outcome import Outcome
from tests.unit.makers import item, rendered


def test_silence_counts_from_the_start_and_ends_with_each_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    assignment = Assignment(item(), lambda outcome: None)
    now_s = 500.0
    assert assignment.silent_s == 0.0, "it may wait for others before it"
    assignment.start()
    now_s = 507.0
    assert assignment.silent_s == 7.0
    assignment.beat("denoise", 3, 30)
    now_s = 508.0
    assert assignment.silent_s == 1.0 and assignment.last_beat == Beat(1, "denoise", 3, 30)


def test_a_cancelled_attempt_hears_of_it_with_its_next_sign() -> None:
    assignment = Assignment(item(), lambda outcome: None)
    assignment.beat("denoise", 1, 30)
    assignment.cancel()
    with pytest.raises(Cancelled, match="at step 2 of denoise"):
        assignment.beat("denoise", 2, 30)


def test_only_the_first_end_counts() -> None:
    ends: list[Outcome | None] = []
    assignment = Assignment(item(), ends.append)
    assignment.end(None)
    assignment.end(rendered(item()))
    assert ends == [None] and assignment.has_ended
