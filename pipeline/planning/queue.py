"""The work of a run: what comes next, what is in flight, what waits for its twin.

Pure bookkeeping over `WorkItem`s; the driver asks and tells. Rows with equal content keys share one video: the first
is rendered, its twins wait for it. Rows with the same adapters run one after the other, because fusing a set into the
model's weights and taking it out again costs seconds.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable

from pipeline.records.work import WorkItem

# A recipe may fuse adapters of its own. Hash and strength of each adapter of the row.
AdapterSet = tuple[str, tuple[tuple[str, float], ...]]
# Larger priorities first, then the first row of the item's set, then its own row, which no other item has.
Place = tuple[int, int, int]


class WorkQueue:
    """Hands out items by priority, then by set of adapters, the sets and the rows of each in row order.

    Each key is in flight at most once.
    """

    def __init__(self, items: Iterable[WorkItem]) -> None:
        # Priority and set of adapters -> its first row.
        self._first_row: dict[tuple[int, AdapterSet], int] = {}
        self._waiting: list[tuple[Place, WorkItem]] = []
        self._in_flight: dict[str, WorkItem] = {}
        self._twins: dict[str, list[WorkItem]] = defaultdict(list)
        first: set[str] = set()
        for item in sorted(items, key=lambda item: item.request.row_index):
            self._first_row.setdefault(_set_of(item), item.request.row_index)
            if item.key in first:
                self._twins[item.key].append(item)
            else:
                first.add(item.key)
                self._waiting.append((self._place(item), item))
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
            heapq.heappush(self._waiting, (self._place(twins[0]), twins[0]))
            self._twins[item.key] = twins[1:]

    def take_back(self, item: WorkItem) -> None:
        """`item`, which was in flight, goes back to its place in the order, with the attempt number it now bears."""
        del self._in_flight[item.key]
        heapq.heappush(self._waiting, (self._place(item), item))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(len(twins) for twins in self._twins.values())

    @property
    def in_flight(self) -> list[WorkItem]:
        return list(self._in_flight.values())

    def unfinished(self) -> list[WorkItem]:
        """Everything that is neither settled nor set aside, in the order it would run."""
        waiting = [item for _, item in sorted(self._waiting)]
        twins = [twin for group in self._twins.values() for twin in group]
        return [*self._in_flight.values(), *waiting, *twins]

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._in_flight

    def _place(self, item: WorkItem) -> Place:
        return (-item.request.priority, self._first_row[_set_of(item)], item.request.row_index)


def _set_of(item: WorkItem) -> tuple[int, AdapterSet]:
    adapters = tuple((adapter.sha256, adapter.strength) for adapter in item.request.wishes.adapters)
    return item.request.priority, (item.request.recipe, adapters)
