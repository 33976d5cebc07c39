"""Between queue and pool: which item goes to a free worker next, and which workers the queue can use.

Gathers what `planning.layout_choice` decides by, and asks it anew only when that has changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from pipeline.cluster.pool import Pool
from pipeline.planning.layout_choice import Choice, Demand, HandOut, choose, is_few
from pipeline.planning.pace import Pace
from pipeline.planning.queue import WorkQueue
from pipeline.planning.timetable import Busy, Fleet
from pipeline.records.outcome import NS_PER_S
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import Offer, WorkItem

# A choice among few clips also depends on how far those in flight have come.
CHOOSE_AGAIN_NS = NS_PER_S


class Dispatch:
    """`deadline_ns` is the job's, in UTC nanoseconds."""

    def __init__(self, queue: WorkQueue, pool: Pool, pace: Pace, deadline_ns: int | None) -> None:
        self._queue = queue
        self._pool = pool
        self._pace = pace
        self._deadline_ns = deadline_ns
        self._choice = Choice()
        self._fleet: Fleet | None = None
        self._chosen_for: tuple[int, Fleet] | None = None
        self._chosen_ns = 0

    def next(self, now_ns: int) -> HandOut | None:
        """What a free worker can be given now; None if nothing waits, or only for workers that are not free."""
        head = self._queue.peek()
        if head is None:
            return None
        if not head.offers:
            return _as_given(head) if self._pool.num_free(head.layout) else None
        choice = self._choose(now_ns, head)
        for layout, hand_out in choice.next_on.items():
            if self._num_at_work(layout) < choice.groups.get(layout, 0) and self._pool.num_free(layout):
                return hand_out
        return None

    def want(self, now_ns: int, *, may_start: bool) -> None:
        """As many workers as have, or could have, something to do; at the tail some are kept to race stragglers."""
        queue, head = self._queue, self._queue.peek() if may_start else None
        groups = {layout: num for layout, num in queue.open_on.items() if num}
        if head is None:
            self._pool.want(groups, max(1, queue.num_open // 20) if may_start else 0)
            return
        if not head.offers:
            # All waiting items have one layout, and the pool has a bound of its own.
            groups[head.layout] = groups.get(head.layout, 0) + queue.num_waiting
        else:
            groups = dict(self._choose(now_ns, head).groups)
        self._pool.want(groups)

    def _num_at_work(self, layout: ParallelLayout) -> int:
        """Workers whose devices are at work, or will be once they are loaded. Clips in flight are more: those whose
        files are still written hold no device."""
        held = self._fleet.held.get(layout, 0) if self._fleet is not None else 0
        return held - self._pool.num_free(layout)

    def _choose(self, now_ns: int, head: WorkItem) -> Choice:
        queue = self._queue
        fleet = self._fleet = self._pool.fleet()
        if fleet is None:
            return Choice()
        if not fleet.num_gpus:
            # A cluster may grow for who asks; who asks in vain is told what there is.
            return Choice({head.layout: 1})
        is_stale = now_ns - self._chosen_ns > CHOOSE_AGAIN_NS
        if self._chosen_for != (queue.version, fleet) or is_stale:
            self._chosen_for, self._chosen_ns = (queue.version, fleet), now_ns
            self._choice = choose(self._demand(fleet, now_ns), _in_estimates(fleet, self._pace.scale))
        return self._choice

    def _demand(self, fleet: Fleet, now_ns: int) -> Demand:
        queue, pace = self._queue, self._pace
        weighs = is_few(queue.num_waiting, fleet.num_gpus)
        left_s = float("inf")
        if self._deadline_ns is not None:
            left_s = (self._deadline_ns - now_ns) / NS_PER_S / pace.scale
        return Demand(
            lanes=queue.lanes(),
            in_flight={layout: num for layout, num in queue.open_on.items() if num},
            in_flight_gpu_seconds=queue.open_gpu_seconds,
            few=queue.waiting() if weighs else None,
            busy=tuple(self._busy(queue.in_flight, now_ns)) if weighs else (),
            deadline_s=left_s,
        )

    def _busy(self, items: Iterable[WorkItem], now_ns: int) -> Iterator[Busy]:
        """The clips that devices are at work for: of a layout's, those that have longest to go."""
        left_s: defaultdict[ParallelLayout, list[float]] = defaultdict(list)
        for item in items:
            left_s[item.layout].append(self._pace.left_s(item, now_ns) / self._pace.scale)
        for layout, each in left_s.items():
            each.sort(reverse=True)
            yield from (Busy(layout, seconds) for seconds in each[: self._num_at_work(layout)])


def _as_given(item: WorkItem) -> HandOut:
    return HandOut(item, Offer(item.layout, item.estimate), item.layout_reason)


def _in_estimates(fleet: Fleet, scale: float) -> Fleet:
    """With its seconds made those of estimates."""
    return Fleet(fleet.num_gpus, fleet.gpus_per_node, fleet.load_s / scale, fleet.held)
