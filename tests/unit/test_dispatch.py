"""What goes to a free worker next, and which workers are wanted, as what there is changes."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.cluster.dispatch import Dispatch
from pipeline.planning.pace import Pace
from pipeline.planning.queue import WorkQueue
from pipeline.planning.timetable import Fleet
from pipeline.records.parallel import ONE_GPU, ParallelLayout
from pipeline.records.work import WorkItem
from tests.unit.makers import S, item
from tests.unit.test_driver import ScriptedPool, succeeds
from tests.unit.test_layout_choice import FOUR, clip


class Staffed(ScriptedPool):
    """A pool that has what a test gives it."""

    def __init__(self, fleet: Fleet | None, free: Mapping[ParallelLayout, int]) -> None:
        super().__init__(succeeds)
        self.given_fleet, self.given_free = fleet, free
        self.asked: list[dict[str, int]] = []

    def fleet(self) -> Fleet | None:
        return self.given_fleet

    def num_free(self, layout: ParallelLayout) -> int:
        return self.given_free.get(layout, 0)

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None:
        self.asked.append({layout.name: num for layout, num in workers.items()})


def dispatch(items: list[WorkItem], pool: Staffed) -> tuple[Dispatch, WorkQueue]:
    queue = WorkQueue(items)
    return Dispatch(queue, pool, Pace(), None), queue


def test_nothing_is_wanted_before_it_is_known_what_there_is() -> None:
    pool = Staffed(None, {})
    this, _ = dispatch([clip(0)], pool)
    this.want(0, may_start=True)
    assert pool.asked == [{}] and this.next(0) is None


def test_a_cluster_without_gpus_is_asked_for_one_worker_so_that_it_grows_or_the_wait_ends() -> None:
    pool = Staffed(Fleet(0, 0), {})
    this, _ = dispatch([clip(0), clip(1)], pool)
    this.want(0, may_start=True)
    assert pool.asked == [{"single": 1}]


def test_free_workers_of_another_layout_than_the_chosen_one_are_given_nothing() -> None:
    """The last clip waits for four GPUs together, though one is free: that is sooner than one GPU alone."""
    pool = Staffed(Fleet(4, 4, 5.0, {ONE_GPU: 4}), {ONE_GPU: 4})
    this, queue = dispatch([clip(0, 300.0)], pool)
    this.want(0, may_start=True)
    assert pool.asked == [{"ulysses4": 1}] and this.next(0) is None
    pool.given_fleet, pool.given_free = Fleet(4, 4, 5.0, {FOUR: 1}), {FOUR: 1}
    chosen = this.next(S)
    assert chosen is not None and chosen.offer.layout == FOUR
    queue.hand_out(chosen)
    this.want(S, may_start=True)
    assert pool.asked[-1] == {"ulysses4": 1}


def test_items_without_offers_go_to_workers_of_their_layout_and_as_many_are_wanted_as_have_work() -> None:
    pool = Staffed(None, {ONE_GPU: 1})
    this, queue = dispatch([item(0), item(1)], pool)
    this.want(0, may_start=True)
    chosen = this.next(0)
    assert chosen is not None and chosen.item.request.id == "row-0" and chosen.reason == "given"
    queue.hand_out(chosen)
    this.want(0, may_start=True)
    this.want(0, may_start=False)
    assert pool.asked == [{"single": 2}, {"single": 2}, {"single": 1}]


def test_a_worker_whose_last_clip_is_still_written_to_its_file_is_given_the_next_one() -> None:
    pool = Staffed(Fleet(1, 1, 5.0, {ONE_GPU: 1}), {ONE_GPU: 1})
    this, queue = dispatch([clip(number) for number in range(3)], pool)
    for _ in range(2):
        chosen = this.next(0)
        assert chosen is not None, "its device is free"
        handed_out = queue.hand_out(chosen)
        assert handed_out is not None
        this._pace.start(handed_out, 0)
    pool.given_free = {}
    assert this.next(0) is None
