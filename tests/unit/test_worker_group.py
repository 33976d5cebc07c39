"""When a worker of several ranks is free, and when and why it is lost."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from pipeline.cluster.assignment import Beat
from pipeline.cluster.node_agent import Process
from pipeline.cluster.rank_report import Hello, Report, Sign
from pipeline.cluster.worker_group import LAST_MOMENT_S, Rank, WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.cost.pricing import UnitPrice
from pipeline.errors import CheckpointMismatch
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem
from tests.unit.makers import item, rendered

PLAN = WorkerPlan("run-1", "cpu", UnitPrice("p", Decimal(1)), threads=1, max_ranks=2, start_timeout_s=60.0,
                  hang_after_s=60.0, load_timeout_s=1800.0)  # fmt: skip
IDLE = Report((), None, (), None, is_ready=True, num_taken=0, is_free=True, signs=())


def group_of(plan: WorkerPlan = PLAN) -> WorkerGroup:
    ranks = [Rank(index, f"cpu-{index}", None) for index in range(2)]
    group = WorkerGroup("group-0", ParallelLayout(2), ranks, None, plan, asked_s=0.0)
    for rank in ranks:
        rank.hello = Hello(Process(1, "1"), "node", "host", 0, 0, ())
    group.has_begun = True
    return group


def ready() -> WorkerGroup:
    group = group_of()
    for rank in group.ranks:
        group.hear(rank, IDLE, 5.0)
    return group


def busy(work: WorkItem, step: int, silent_s: float, **more: Any) -> Report:
    sign = Sign(work.key, work.attempt, Beat(step, "denoise", step, 30), silent_s)
    return replace(IDLE, num_taken=1, is_free=False, signs=(sign,), **more)


def test_it_is_free_only_when_every_rank_is_done_with_the_last_item() -> None:
    group, work = ready(), item()
    assert group.is_free
    group.take(work, 0)
    group.hear(group.ranks[0], replace(IDLE, is_free=True, num_taken=0), 6.0)
    assert not group.is_free, "that was said before the item arrived"
    done = replace(IDLE, num_taken=1)
    group.hear(group.ranks[0], replace(done, outcomes=(rendered(work),)), 7.0)
    assert group.conclude(7.0) == [rendered(work)] and not group.is_free
    group.hear(group.ranks[1], done, 7.1)
    assert group.is_free


def test_an_item_that_is_to_be_alone_waits_for_what_is_still_being_finished() -> None:
    group, first, second = ready(), item(0), replace(item(1), alone=True)
    group.take(first, 0)
    for rank in group.ranks:
        group.hear(rank, replace(IDLE, num_taken=1), 6.0)
    assert group.is_free and group.take(second, 1) is False
    assert not group.is_free and group.next_waiting() is None
    assert [(held.item.request.id, held.is_suspect) for held in group.held()] == [("row-0", False), ("row-1", False)]
    group.hear(group.ranks[0], replace(IDLE, num_taken=1, outcomes=(rendered(first),)), 7.0)
    group.conclude(7.0)
    assert group.next_waiting() == second
    assert [(held.item.request.id, held.is_suspect) for held in group.held()] == [("row-1", True)]


def test_an_item_that_waits_to_be_alone_is_given_back_once_and_its_worker_is_free_again() -> None:
    group, first, second = ready(), item(0), replace(item(1), alone=True)
    group.take(first, 0)
    for rank in group.ranks:
        group.hear(rank, replace(IDLE, num_taken=1), 6.0)
    group.take(second, 1)
    assert group.withdraw(first) is None, "its ranks have it"
    withdrawn = group.withdraw(second)
    assert withdrawn is not None and (withdrawn.item, withdrawn.since_ns) == (second, 1)
    assert group.withdraw() is None and group.next_waiting() is None and group.is_free


def test_an_item_that_is_only_being_finished_is_judged_by_its_own_signs() -> None:
    group, older, newer = ready(), item(0), item(1)
    group.take(older, 0)
    group.take(newer, 1)
    signs = (Sign(older.key, 1, Beat(31, "encode"), 61.0), Sign(newer.key, 1, Beat(9, "denoise", 8, 30), 0.1))
    group.hear(group.ranks[0], replace(IDLE, num_taken=2, is_free=False, signs=signs), 100.0)
    loss = group.loss(100.0)
    assert loss is not None and loss.cause == (
        'cpu-0 (rank 0 of group-0) gave no sign of life for 60 s after encode of row "row-0"'
    )


def test_a_worker_that_was_ended_says_no_farewell_any_more() -> None:
    group = ready()
    group.ranks[1].is_awaited = True
    assert group.is_saying_farewell
    group.is_ended = True
    assert not group.is_saying_farewell


def test_the_rank_that_is_least_far_is_the_one_that_hangs() -> None:
    group, work = ready(), item()
    group.take(work, 0)
    group.hear(group.ranks[0], busy(work, 8, 59.0), 100.0)
    group.hear(group.ranks[1], busy(work, 7, 59.5), 100.0)
    assert group.loss(100.0) is None
    group.hear(group.ranks[0], busy(work, 8, 60.5), 101.5)
    loss = group.loss(101.5)
    assert loss is not None and loss.fault == "Hang"
    assert loss.cause == ('cpu-1 (rank 1 of group-0) gave no sign of life for 60 s after step 7 of 30 of denoise '
                          'of row "row-0"')  # fmt: skip


def test_a_step_that_is_predicted_to_take_long_may_take_five_times_as_long() -> None:
    group, work = ready(), item()
    work = replace(work, estimate=replace(work.estimate, longest_step_s=100.0))
    group.take(work, 0)
    group.hear(group.ranks[0], busy(work, 3, 499.0), 600.0)
    assert group.loss(600.0) is None
    group.hear(group.ranks[0], busy(work, 3, 501.0), 602.0)
    assert group.loss(602.0) is not None


def test_a_rank_that_does_not_answer_hangs_also_while_it_loads() -> None:
    group = group_of()
    group.ranks[1].due_s = 10.0
    assert group.loss(69.0) is None
    loss = group.loss(70.1)
    assert loss is not None and loss.fault == "Hang"
    assert loss.cause == "cpu-1 (rank 1 of group-0) has not answered for 60 s while it loaded"


def test_loading_may_take_long_but_not_for_ever() -> None:
    group = group_of()
    assert group.loss(1799.0) is None
    loss = group.loss(1801.0)
    assert loss is not None and loss.cause == "cpu-0 (rank 0 of group-0) was not loaded within 1800 s"


def test_what_a_rank_meets_while_it_loads_is_held_back_until_a_siblings_death_would_be_known() -> None:
    group, error = group_of(), RuntimeError("connection closed by peer\nmore")
    group.hear(group.ranks[0], replace(IDLE, is_ready=False, error=error), 10.0)
    assert group.loss(10.5) is None
    loss = group.loss(11.5)
    assert loss is not None and loss.error is error


def test_what_a_rank_means_by_its_error_counts_more_than_what_its_siblings_meet() -> None:
    group, error = group_of(), CheckpointMismatch("tensors differ")
    group.hear(group.ranks[0], replace(IDLE, is_ready=False, error=RuntimeError("connection closed by peer")), 10.0)
    group.hear(group.ranks[1], replace(IDLE, is_ready=False, error=error), 10.5)
    loss = group.loss(11.1)
    assert loss is not None and loss.error is error


def test_a_worker_that_raises_after_it_was_ready_is_lost_and_the_job_goes_on() -> None:
    group = ready()
    group.hear(group.ranks[1], replace(IDLE, error=RuntimeError("device-side assert")), 10.0)
    loss = group.loss(10.0)
    assert loss is not None and (loss.fault, loss.error) == ("WorkerLost", None)
    assert loss.cause == "cpu-1 (rank 1 of group-0): RuntimeError: device-side assert"


def test_on_a_node_that_drains_it_takes_nothing_more_and_ends_shortly_before_the_node() -> None:
    group = ready()
    group.is_draining, group.drained_at_s = True, 100.0
    assert not group.is_free and group.loss(100.0 - LAST_MOMENT_S) is None
    loss = group.loss(100.1 - LAST_MOMENT_S)
    assert loss is not None and loss.fault == "Preempted"


def test_an_idle_worker_is_spare_once_it_was_idle_for_as_long_as_its_start_took() -> None:
    group = group_of()
    group.placed_s = 2.0
    for rank in group.ranks:
        group.hear(rank, IDLE, 12.0)
    assert group.ready_after_s == 10.0
    assert not group.is_spare(21.9) and group.is_spare(22.0)
    group.take(item(), 0)
    assert not group.is_spare(1000.0)
