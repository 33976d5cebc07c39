"""What became of a gang's item, when its ranks say different things or one says nothing."""

from __future__ import annotations

from pipeline.cluster.agreement import FOLLOW_S, SIBLING_S, Agreement
from pipeline.records.outcome import Failed
from pipeline.records.work import WorkItem
from tests.unit.makers import item, rendered


def failed(work: WorkItem, fault: str) -> Failed:
    return Failed(work, fault, "it broke", fault, 0, 1)


def pair_with(work: WorkItem) -> Agreement:
    agreement = Agreement(num_ranks=2)
    agreement.hand_in(work, now_ns=0)
    return agreement


def test_the_leaders_answer_counts_and_ends_the_item() -> None:
    work = item()
    agreement = pair_with(work)
    assert agreement.conclude(10.0, leader_is_free=False) == []
    agreement.hear(0, rendered(work), 10.0)
    assert agreement.conclude(10.0, leader_is_free=True) == [rendered(work)]
    assert not agreement.held and agreement.is_at_one


def test_a_fault_of_the_engine_is_held_back_until_a_siblings_death_would_be_known() -> None:
    work = item()
    agreement = pair_with(work)
    fault = failed(work, "EngineFault")
    agreement.hear(0, fault, 10.0)
    assert agreement.conclude(10.0 + SIBLING_S / 2, leader_is_free=True) == []
    assert not agreement.is_at_one, "it may take no other item meanwhile"
    assert agreement.conclude(10.0 + SIBLING_S, leader_is_free=True) == [fault]


def test_other_faults_and_those_of_a_single_rank_are_told_at_once() -> None:
    work = item()
    for num_ranks, fault in ((2, "InvalidRequest"), (1, "EngineFault")):
        agreement = Agreement(num_ranks)
        agreement.hand_in(work, 0)
        agreement.hear(0, failed(work, fault), 10.0)
        assert agreement.conclude(10.0, leader_is_free=True) == [failed(work, fault)]


def test_a_follower_that_failed_alone_parts_the_gang_whichever_rank_speaks_first() -> None:
    work = item()
    for order in ((0, 1), (1, 0)):
        agreement = pair_with(work)
        for rank in order:
            agreement.hear(rank, failed(work, "OutOfMemory") if rank else rendered(work), 10.0)
            agreement.conclude(10.0, leader_is_free=True)
        assert not agreement.held and agreement.quarrel is not None
        assert agreement.quarrel.startswith('rank 1 failed alone at row "row-0": OutOfMemory')


def test_a_follower_that_was_cancelled_too_late_is_as_good_as_before() -> None:
    work = item()
    agreement = pair_with(work)
    agreement.hear(1, failed(work, "Cancelled"), 10.0)
    agreement.hear(0, rendered(work), 10.0)
    assert agreement.conclude(10.0, leader_is_free=True) == [rendered(work)]
    assert agreement.is_at_one


def test_ranks_that_fail_together_do_not_part() -> None:
    work = item()
    agreement = pair_with(work)
    agreement.hear(1, failed(work, "OutOfMemory"), 10.0)
    agreement.hear(0, failed(work, "OutOfMemory"), 10.1)
    assert agreement.conclude(10.1, leader_is_free=True) == [failed(work, "OutOfMemory")]
    assert agreement.is_at_one


def test_a_followers_failure_stands_for_a_leader_that_waits_for_it_in_vain() -> None:
    work = item()
    agreement = pair_with(work)
    agreement.hear(1, failed(work, "OutOfMemory"), 10.0)
    assert agreement.conclude(10.0 + FOLLOW_S, leader_is_free=False) == []
    assert agreement.conclude(10.1 + FOLLOW_S, leader_is_free=False) == [failed(work, "OutOfMemory")]
    assert agreement.quarrel is not None


def test_a_leader_whose_device_is_done_may_take_its_time_to_answer() -> None:
    work = item()
    agreement = pair_with(work)
    agreement.hear(1, failed(work, "EngineFault"), 10.0)
    assert agreement.conclude(500.0, leader_is_free=True) == []
    assert not agreement.is_at_one


def test_a_rank_that_stays_behind_is_noticed_only_once_its_item_has_ended() -> None:
    first, second = item(0), item(1)
    agreement = pair_with(first)
    assert agreement.still_at_it(1, 1000.0, FOLLOW_S) is None
    agreement.hear(0, rendered(first), 1000.0)
    assert agreement.still_at_it(1, 1000.0 + FOLLOW_S, FOLLOW_S) is None
    cause = agreement.still_at_it(1, 1000.1 + FOLLOW_S, FOLLOW_S)
    assert cause == 'rank 1 was still at row "row-0" 5 s after it had been ended'
    agreement.hand_in(second, 0)
    assert agreement.still_at_it(1, 2000.0, FOLLOW_S) is None
