"""What one lane lends the other outlives its reading, and both are in step again however the work ends."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pipeline.model import lane as lane_module
from pipeline.model.lane import INLINE, Lane


class Queue:
    """A stream that notes whom it waits for."""

    device = "cuda"

    def __init__(self, name, log):
        self.name, self._log = name, log

    def wait_stream(self, other):
        self._log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    waits = []
    caller = Queue("caller", waits)
    monkeypatch.setattr(lane_module.torch.cuda, "current_stream", lambda device: caller)
    return waits


def lent(lane, log):
    """Two tensors, each lent to the other side, that nothing else holds; when one is freed, that is noted."""
    tensors = torch.zeros(1), torch.zeros(1)
    lane.swap(*tensors)
    return [weakref.ref(tensor, lambda gone: log.append("freed")) for tensor in tensors]


def alive(tensors):
    gc.collect()
    return [tensor() is not None for tensor in tensors]


def test_what_is_lent_is_held_until_both_sides_have_passed_their_reading(log):
    lane = Lane(Queue("lane", log))
    with lane.beside():
        first = lent(lane, log)
        assert alive(first) == [True, True], "each side may still read"
        second = lent(lane, log)
        assert alive(first) == [False, False] and alive(second) == [True, True]
    assert alive(second) == [False, False]
    follows, joins, freed = "lane waits for caller", "caller waits for lane", "freed"
    assert log == [follows, follows, joins, follows, joins, freed, freed, joins, freed, freed]


def test_the_caller_waits_for_the_lane_where_an_error_ends_the_work_too(log):
    lane = Lane(Queue("lane", log))
    with pytest.raises(ZeroDivisionError), lane.beside():
        lent(lane, log)
        raise ZeroDivisionError
    assert log[-1] == "caller waits for lane"


def test_without_a_stream_nothing_is_held(log):
    with INLINE.beside():
        assert alive(lent(INLINE, log)) == [False, False]
    assert log == ["freed", "freed"]
