"""How many GPUs each clip gets, and why, as its row says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from pipeline.planning.layout_choice import Choice, Demand, Lane, choose, is_few, needed_gpus, possible
from pipeline.planning.queue import WorkQueue
from pipeline.planning.timetable import Busy, Fleet, lay_out
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import Estimate, Offer, WorkItem
from tests.unit.makers import item

ONE, TWO, FOUR = (ParallelLayout(ulysses=n) for n in (1, 2, 4))
# Speed-ups like those that were measured.
SPEED_UP = {1: 1.0, 2: 1.8, 4: 3.1}


def offer(layout: ParallelLayout, alone_s: float, misfit: str = "") -> Offer:
    num = layout.num_gpus
    gpu_seconds = num * alone_s / SPEED_UP[num]
    return Offer(layout, Estimate(1e12, gpu_seconds, 0.001 * gpu_seconds, "uncalibrated", num_gpus=num), misfit)


def clip(index: int, alone_s: float = 30.0, *, fits_from: int = 1) -> WorkItem:
    offers = tuple(
        offer(layout, alone_s, "92 GB do not fit one card of 80 GB" if layout.num_gpus < fits_from else "")
        for layout in (ONE, TWO, FOUR)
    )
    first = next((each for each in offers if not each.misfit), offers[-1])
    return replace(item(index), layout=first.layout, estimate=first.estimate, offers=offers)


def demand_of(items: Sequence[WorkItem], busy: tuple[Busy, ...] = (), *, num_gpus: int = 4,
              deadline_s: float = float("inf")) -> Demand:  # fmt: skip
    queue = WorkQueue(items)
    in_flight: dict[ParallelLayout, int] = {}
    for each in busy:
        in_flight[each.layout] = in_flight.get(each.layout, 0) + 1
    few = queue.waiting() if is_few(len(items), num_gpus) else None
    return Demand(queue.lanes(), in_flight, sum(each.gpu_seconds_left for each in busy), few, busy, deadline_s)


def chosen(choice: Choice) -> dict[str, tuple[int, str]]:
    return {layout.name: (choice.groups.get(layout, 0), each.reason) for layout, each in choice.next_on.items()}


def test_one_gpu_a_clip_while_there_are_more_clips_than_gpus() -> None:
    choice = choose(demand_of([clip(i) for i in range(40)]), Fleet(4, 4, 20.0))
    assert chosen(choice) == {"single": (4, "1 GPU: 40 clips wait for 4 GPUs")}


def test_of_very_many_clips_too() -> None:
    choice = choose(demand_of([clip(i) for i in range(1000)]), Fleet(4, 4, 20.0))
    assert chosen(choice) == {"single": (4, "1 GPU: 1000 clips wait for 4 GPUs")}


def test_the_last_clip_gets_all_gpus_if_loading_them_pays_for_itself() -> None:
    idle = {ONE: 4}
    for load_s, expected in ((10.0, "ulysses4"), (25.0, "single")):
        (name,) = chosen(choose(demand_of([clip(0, 30.0)]), Fleet(4, 4, load_s, idle)))
        assert name == expected, load_s
    choice = choose(demand_of([clip(0, 30.0)]), Fleet(4, 4, 10.0, idle))
    assert chosen(choice) == {"ulysses4": (1, "4 GPUs: tail, no other clip waits")}


def test_what_runs_on_the_gpus_that_a_wide_group_will_take_is_followed_there_by_nothing_else() -> None:
    """Four clips end in 2 s; the last one waits for their GPUs, and none of them is wanted any more."""
    busy = tuple(Busy(ONE, 2.0) for _ in range(4))
    choice = choose(demand_of([clip(0, 200.0)], busy), Fleet(4, 4, 20.0, {ONE: 4}))
    assert choice.groups == {FOUR: 1}


def test_few_clips_share_the_gpus() -> None:
    choice = choose(demand_of([clip(0), clip(1)]), Fleet(4, 4, 20.0))
    assert chosen(choice) == {"ulysses2": (2, "2 GPUs: tail, 2 clips for 4 GPUs")}


def test_a_clip_that_would_outlast_all_others_is_spread_from_the_start() -> None:
    items = [clip(0, 4000.0), *(clip(i, 2.0) for i in range(1, 900))]
    choice = choose(demand_of(items), Fleet(4, 4, 20.0))
    reason = choice.next_on[FOUR].reason
    assert choice.next_on[FOUR].item.request.id == "row-0" and "on fewer it would outlast the other 899 clips" in reason


def test_what_does_not_fit_one_card_gets_two_beside_others_on_one() -> None:
    items = [*(clip(i, 60.0, fits_from=2) for i in range(6)), *(clip(i, 30.0) for i in range(6, 700))]
    choice = choose(demand_of(items), Fleet(4, 4, 20.0))
    assert chosen(choice) == {
        "ulysses2": (1, "2 GPUs: 92 GB do not fit one card of 80 GB"),
        "single": (2, "1 GPU: 700 clips wait for 4 GPUs"),
    }


def test_what_fits_no_node_is_tried_on_the_widest_layout_and_its_row_says_so() -> None:
    work = clip(0, fits_from=8)
    assert [each.layout for each in possible(work, 2)] == [TWO]
    (entry,) = chosen(choose(demand_of([work]), Fleet(2, 2, 20.0))).values()
    assert entry == (1, "2 GPUs: 92 GB do not fit one card of 80 GB, and a node has no more")


@pytest.mark.parametrize(
    ("left_s", "name"), [(40.0, "single"), (25.0, "ulysses2"), (12.0, "ulysses4"), (5.0, "single")]
)
def test_a_deadline_is_met_by_the_layout_of_fewest_gpu_seconds_that_can(left_s: float, name: str) -> None:
    """With 40 others waiting, so that nothing else speaks for more GPUs; what no layout can meet is not spread."""
    choice = choose(demand_of([clip(i) for i in range(40)], deadline_s=left_s), Fleet(4, 4, 20.0))
    assert list(choice.next_on) == [ParallelLayout.named(name)]
    if left_s < 30 and name != "single":
        assert "on fewer it would miss the deadline" in next(iter(choice.next_on.values())).reason


def test_a_clip_that_ran_out_of_memory_gets_no_fewer_gpus_than_it_needs_now() -> None:
    work = replace(clip(0), min_gpus=2)
    assert needed_gpus(work) == 2 and possible(work, 4)[0].layout == TWO
    (reason,) = [each.reason for each in choose(demand_of([work, *(clip(i) for i in range(1, 9))]),
                                                Fleet(2, 2, 20.0)).next_on.values() if each.item is work]  # fmt: skip
    assert reason == "2 GPUs: it ran out of memory on fewer"


def test_an_item_without_offers_has_its_layout() -> None:
    assert needed_gpus(replace(item(0), layout=FOUR)) == 4
    assert possible(item(0), 1) == (Offer(ONE, item(0).estimate),)


def end_s(
    layouts: Sequence[ParallelLayout], fleet: Fleet, busy: tuple[Busy, ...] = ()
) -> tuple[float, Mapping[ParallelLayout, int]]:
    table = lay_out([offer(layout, 30.0) for layout in layouts], busy, fleet)
    return round(table.end_s, 1), table.groups


def test_a_timetable_puts_each_clip_where_it_ends_first() -> None:
    assert end_s([ONE] * 5, Fleet(4, 4, 20.0)) == (80.0, {ONE: 4})
    assert end_s([ONE] * 5, Fleet(4, 4, 20.0, {ONE: 4})) == (60.0, {ONE: 4})
    assert end_s([FOUR], Fleet(8, 4, 20.0, {ONE: 4})) == (29.7, {FOUR: 1}), "the other node is free"
    assert end_s([FOUR], Fleet(4, 4, 20.0, {ONE: 4}), (Busy(ONE, 7.0),)) == (36.7, {FOUR: 1})
    assert end_s([ONE, ONE, ONE, ONE, FOUR], Fleet(4, 4, 20.0, {ONE: 4})) == (59.7, {ONE: 4}), (
        "the wide one is for later"
    )
    assert end_s([FOUR], Fleet(4, 2))[0] == float("inf")


def test_lanes_keep_the_order_and_the_sums_of_what_waits() -> None:
    items = [clip(0, 60.0, fits_from=2), *(clip(i, 30.0) for i in range(1, 4))]
    queue = WorkQueue(items)
    lanes = {needed_gpus(lane.head): lane for lane in queue.lanes()}
    assert lanes[1] == Lane(items[1], 3, pytest.approx(90.0)) and lanes[2].num_clips == 1
    assert [each.request.id for each in queue.waiting()] == ["row-0", "row-1", "row-2", "row-3"]
    choice = choose(Demand(queue.lanes(), few=queue.waiting()), Fleet(4, 4, 1e6))
    handed_out = queue.hand_out(choice.next_on[ONE])
    assert handed_out is not None and handed_out.layout == ONE and handed_out.layout_reason.startswith("1 GPU")
    assert queue.open_on[ONE] == 1 and queue.num_waiting == 3
    queue.drop(handed_out)
    queue.take_back(handed_out)
    assert queue.open_on[ONE] == 0 and queue.num_waiting == 4 and queue.open_gpu_seconds == 0
