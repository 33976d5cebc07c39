"""The order of work, twins, and taking back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.planning.queue import WorkQueue
from pipeline.records.wishes import AdapterUse
from pipeline.records.work import WorkItem
from tests.unit.makers import item


def drained(queue: WorkQueue) -> list[str]:
    ids = []
    while (work := queue.hand_out()) is not None:
        ids.append(work.request.id)
        queue.settle(work)
    return ids


def test_larger_priority_first_then_row_order() -> None:
    queue = WorkQueue([item(0), item(1, priority=5), item(2), item(3, priority=5)])
    assert drained(queue) == ["row-1", "row-3", "row-0", "row-2"]
    assert queue.is_empty


def test_rows_with_equal_keys_are_rendered_once_and_settled_together() -> None:
    queue = WorkQueue([item(0, key="k"), item(1, key="k"), item(2, key="other")])
    first = queue.hand_out()
    assert first is not None and first.request.id == "row-0"
    assert [twin.request.id for twin in queue.settle(first)] == ["row-1"]
    assert drained(queue) == ["row-2"]


def test_a_twin_gets_its_own_try_when_the_first_is_set_aside() -> None:
    queue = WorkQueue([item(0, key="k"), item(1, key="k"), item(2, key="k")])
    first = queue.hand_out()
    assert first is not None
    assert not queue.drop(first)
    queue.set_aside(first)
    second = queue.hand_out()
    assert second is not None and second.request.id == "row-1"
    assert [twin.request.id for twin in queue.settle(second)] == ["row-2"]


def test_an_item_taken_back_comes_next_with_its_attempt_number() -> None:
    queue = WorkQueue([item(0), item(1)])
    first = queue.hand_out()
    assert first is not None
    assert not queue.drop(first)
    queue.take_back(first)
    again = queue.hand_out()
    assert again is not None and (again.request.id, again.attempt) == ("row-0", 2)


def test_nothing_is_lost_from_sight() -> None:
    queue = WorkQueue([item(0, key="k"), item(1, key="k"), item(2)])
    queue.hand_out()
    assert sorted(work.request.id for work in queue.unfinished()) == ["row-0", "row-1", "row-2"]
    assert len(queue.in_flight) == 1


def with_adapters(row_index: int, *hashes: str, **row: Any) -> WorkItem:
    work = item(row_index, **row)
    adapters = tuple(AdapterUse(f"{sha}.safetensors", sha, 1.0) for sha in hashes)
    return replace(work, request=replace(work.request, wishes=replace(work.request.wishes, adapters=adapters)))


def test_rows_with_the_same_adapters_run_one_after_the_other() -> None:
    """Five sets over 1,000 mixed rows are fused five times, within each priority."""
    queue = WorkQueue(with_adapters(i, str(i % 5), priority=i // 500) for i in range(1000))
    fused = []
    while (work := queue.hand_out()) is not None:
        sets = work.request.wishes.adapters
        if not fused or fused[-1] != sets:
            fused.append(sets)
        queue.settle(work)
    assert len(fused) == 10 and fused[:5] == fused[5:]


def test_an_item_taken_back_comes_back_to_its_set() -> None:
    queue = WorkQueue([with_adapters(0, "a"), with_adapters(1, "b"), with_adapters(2, "a"), with_adapters(3)])
    first = queue.hand_out()
    assert first is not None
    assert not queue.drop(first)
    queue.take_back(first)
    assert drained(queue) == ["row-0", "row-2", "row-1", "row-3"]


def with_seconds(row_index: int, seconds: float, **row: Any) -> WorkItem:
    work = item(row_index, **row)
    return replace(work, estimate=replace(work.estimate, gpu_seconds=seconds))


def test_the_longest_predicted_comes_first_within_a_priority() -> None:
    seconds = [3.0, 9.0, 1.0, 9.0]
    queue = WorkQueue([*(with_seconds(i, s) for i, s in enumerate(seconds)), with_seconds(4, 2.0, priority=1)])
    assert drained(queue) == ["row-4", "row-1", "row-3", "row-0", "row-2"]


def test_sets_of_adapters_stay_together_the_one_with_the_longest_clip_first() -> None:
    def work(row_index: int, sha: str, seconds: float) -> WorkItem:
        plain = with_adapters(row_index, sha)
        return replace(plain, estimate=replace(plain.estimate, gpu_seconds=seconds))

    queue = WorkQueue([work(0, "a", 5.0), work(1, "b", 7.0), work(2, "a", 6.0), work(3, "b", 1.0)])
    assert drained(queue) == ["row-1", "row-3", "row-2", "row-0"]


def test_what_is_upcoming_is_about_what_comes_next() -> None:
    queue = WorkQueue([with_seconds(i, float(i)) for i in range(100)])
    assert len(queue.upcoming(4)) == 4 and queue.upcoming(4)[0].request.id == "row-99"
    assert {work.request.row_index for work in queue.upcoming(4)} <= set(range(80, 100))


def test_a_rival_is_another_attempt_and_the_first_to_end_settles_both() -> None:
    queue = WorkQueue([item(0), item(1, key="0" * 64)])
    first = queue.hand_out()
    assert first is not None
    rival = queue.speculate(first)
    assert rival.attempt == 2 and queue.rivals(first) == [rival] and queue.num_in_flight == 1
    queue.settle(rival)
    assert not queue.is_in_flight(first) and not queue.rivals(first)


def test_an_attempt_that_fails_beside_its_rival_decides_nothing() -> None:
    queue = WorkQueue([item(0)])
    first = queue.hand_out()
    assert first is not None
    rival = queue.speculate(first)
    assert queue.drop(first) and queue.is_in_flight(rival)
    assert not queue.drop(rival) and queue.is_empty
    queue.take_back(rival)
    third = queue.hand_out()
    assert third is not None and third.attempt == 3
