"""When waiting for a place is in vain."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from pipeline.cluster import placement
from pipeline.cluster.node_agent import Process
from pipeline.cluster.rank_report import Hello
from pipeline.cluster.room import Room
from pipeline.cluster.worker_group import Rank, WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.cost.pricing import UnitPrice
from pipeline.errors import PipelineError
from pipeline.records.parallel import ParallelLayout

PLAN = WorkerPlan("run-1", "cpu", UnitPrice("p", Decimal(1)), threads=1, max_ranks=None, start_timeout_s=60.0)


def group(*, asked_s: float, is_placed: bool = False, node: str = "node-a", num_ranks: int = 1) -> WorkerGroup:
    ranks = [Rank(index, f"cpu-{index}", None) for index in range(num_ranks)]
    if is_placed:
        ranks[0].hello = Hello(Process(1, "1"), node, "host", 0, 0, ())
    return WorkerGroup("group-0", ParallelLayout(ulysses=num_ranks), ranks, None, PLAN, asked_s)


@pytest.fixture(autouse=True)
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": f"node-{name}", "Alive": True, "Resources": {"CPU": 1.0}} for name in "ab"]
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(placement, "nodes_now", lambda: [("host", {"CPU": 2}, {"CPU": 0})])


def test_a_worker_that_waited_for_hours_gets_the_place_that_came_free_just_now() -> None:
    room, late = Room(PLAN), group(asked_s=0.0)
    room.move(7200.0)
    room.check([late], 7259.0, is_any_leaving=False)
    room.check([late], 7300.0, is_any_leaving=True)
    with pytest.raises(PipelineError, match="1 of 1 workers found no place within 60 s"):
        room.check([late], 7260.5, is_any_leaving=False)


def test_while_one_has_a_place_the_others_may_wait_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    room, groups = Room(PLAN), [group(asked_s=0.0, is_placed=True), group(asked_s=0.0)]
    for now_s in (59.0, 61.0, 62.0):
        room.check(groups, now_s, is_any_leaving=False)
    assert caplog.text.count("going on with fewer workers: 1 of 2 workers") == 1


def test_spoilt_places_are_not_counted_and_none_may_be_left() -> None:
    room = Room(PLAN)
    assert room.nodes({}, 0.0) == {"node-a": 1, "node-b": 1} and not room.is_none_left({})
    room.spoil(group(asked_s=0.0, is_placed=True))
    assert room.nodes({}, 0.1) == {"node-a": 0, "node-b": 1} and not room.is_none_left({})
    assert room.is_none_left({"node-b": 0}), "the other node is about to go"
    room.spoil(group(asked_s=0.0, is_placed=True, node="node-b"))
    assert room.is_none_left({})


def test_where_strangers_hold_gpus_a_job_that_can_goes_on_with_narrower_workers_until_the_nodes_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [{"NodeID": "node-a", "Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    room, wide = Room(replace(PLAN, can_narrow=True)), group(asked_s=0.0, num_ranks=4)
    room.nodes({}, 0.0)
    room.check([wide], 59.0, is_any_leaving=False)
    room.check([wide], 61.0, is_any_leaving=True)
    room.check([wide, group(asked_s=0.0, is_placed=True)], 61.0, is_any_leaving=False)
    assert room.widest is None, "its own workers may be what it waits for"
    room.check([wide], 61.0, is_any_leaving=False)
    assert room.widest == 3
    nodes.append({"NodeID": "node-b", "Alive": True, "Resources": {"CPU": 4.0}})
    room.nodes({}, 70.0)
    assert room.widest is None
    with pytest.raises(PipelineError, match="1 of 1 workers found no place"):
        Room(PLAN).check([wide], 61.0, is_any_leaving=False)
