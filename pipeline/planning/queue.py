"""The work of a run: what comes next, what is in flight, what waits for its twin.

Pure bookkeeping over `WorkItem`s; the driver asks and tells. Rows with equal content keys share one video: the first
is rendered, its twins wait for it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable

from pipeline.records.work import WorkItem


class WorkQueue:
    """Hands out items by priority, then in row order; each key is in flight at most once."""

    def __init__(self, items: Iterable[WorkItem]) -> None:
        self._waiting: list[tuple[int, int, WorkItem]] = []
        self._in_flight: dict[str, WorkItem] = {}
        self._twins: dict[str, list[WorkItem]] = defaultdict(list)
        first: set[str] = set()
        for item in sorted(items, key=_order):
            if item.key in first:
                self._twins[item.key].append(item)
            else:
                first.add(item.key)
                self._waiting.append((*_order(item), item))
        heapq.heapify(self._waiting)

    def hand_out(self) -> WorkItem | None:
        """The next item, now in flight; None if none waits."""
        if not self._waiting:
            return None
        item = heapq.heappop(self._waiting)[-1]
        self._in_flight[item.key] = item
        return item

    def peek(self) -> WorkItem | None:
        return self._waiting[0][-1] if self._waiting else None

    def settle(self, item: WorkItem) -> list[WorkItem]:
        """`item` is done for good; returns the twins that share its video."""
        del self._in_flight[item.key]
        return self._twins.pop(item.key, [])

    def set_aside(self, item: WorkItem) -> None:
        """`item` will not be tried again in this run. Its first twin takes its place: only the id differs, but the
        row has its own right to be tried."""
        del self._in_flight[item.key]
        twins = self._twins.pop(item.key, [])
        if twins:
            heapq.heappush(self._waiting, (*_order(twins[0]), twins[0]))
            self._twins[item.key] = twins[1:]

    def take_back(self, item: WorkItem) -> None:
        """`item`, which was in flight, goes back to its place in the order, with the attempt number it now bears."""
        del self._in_flight[item.key]
        heapq.heappush(self._waiting, (*_order(item), item))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(len(twins) for twins in self._twins.values())

    @property
    def in_flight(self) -> list[WorkItem]:
        return list(self._in_flight.values())

    def unfinished(self) -> list[WorkItem]:
        """Everything that is neither settled nor set aside, in the order it would run."""
        waiting = [entry[-1] for entry in sorted(self._waiting)]
        twins = [twin for group in self._twins.values() for twin in group]
        return [*self._in_flight.values(), *waiting, *twins]

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._in_flight


def _order(item: WorkItem) -> tuple[int, int]:
    return (-item.request.priority, item.request.row_index)
