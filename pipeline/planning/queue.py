"""The work of a run: what comes next, what is in flight, what waits for its twin.

Pure bookkeeping over `WorkItem`s; the driver asks and tells. Rows with equal content keys share one video: the first
is rendered, its twins wait for it. Rows with the same adapters run one after the other, because fusing a set into the
model's weights and taking it out again costs seconds. Long clips come first, so that workers end together. Clips wait
in a lane of their own for each number of GPUs that they need at least, so that one that waits for a wide group does not
hold up the others.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from pipeline.planning.layout_choice import HandOut, Lane, needed_gpus
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem

# A priority, a recipe, which may fuse adapters of its own, and hash and strength of each adapter of the row.
AdapterSet = tuple[int, str, tuple[tuple[str, float], ...]]
# Larger priorities first; then sets by their longest clip and their first row; then clips by length, so that those of
# one shape come together, and by row, which no other item has.
Place = tuple[int, float, int, float, int]


class WorkQueue:
    """Hands out items by priority, then by set of adapters, the longest predicted first.

    Each key is in flight once, but for a rival that `speculate` sets beside a straggler. Attempts are numbered here.
    """

    def __init__(self, items: Iterable[WorkItem]) -> None:
        in_row_order = sorted(items, key=lambda item: item.request.row_index)
        # Set of adapters -> seconds of its longest clip, and its first row.
        self._sets: dict[AdapterSet, tuple[float, int]] = {}
        # The fewest GPUs of a clip -> those that wait, a heap, and the sum of their GPU-seconds.
        self._lanes: dict[int, list[tuple[Place, WorkItem]]] = {}
        self._lane_s: Counter[int] = Counter()
        self.num_waiting = 0
        # Raised with each change of what waits or is in flight.
        self.version = 0
        self._in_flight: dict[str, list[WorkItem]] = {}
        self._twins: dict[str, list[WorkItem]] = defaultdict(list)
        self._attempts: Counter[str] = Counter()
        self._items = in_row_order
        # Items that a worker could take now are counted: twins are not among them. Attempts in flight and their
        # estimates are kept as sums: asked for before each item of a large fleet.
        self.num_open = 0
        self.open_usd = 0.0
        self.open_gpu_seconds = 0.0
        self.open_on: Counter[ParallelLayout] = Counter()
        for item in in_row_order:
            adapters = _set_of(item)
            longest_s, first_row = self._sets.get(adapters, (0.0, item.request.row_index))
            self._sets[adapters] = (max(longest_s, item.estimate.gpu_seconds), first_row)
        first: set[str] = set()
        for item in in_row_order:
            if item.key in first:
                self._twins[item.key].append(item)
            else:
                first.add(item.key)
                self._wait(item)

    def hand_out(self, wanted: HandOut | None = None) -> WorkItem | None:
        """The next item, now in flight under its attempt's number; None if none waits.

        With `wanted` the item that it names, which waits, on the layout that it names.
        """
        item = self.peek() if wanted is None else wanted.item
        if item is None:
            return None
        self._wait_no_more(item)
        if wanted is not None:
            offer = wanted.offer
            item = replace(item, layout=offer.layout, estimate=offer.estimate, layout_reason=wanted.reason)
        item = self._opened(item)
        self._in_flight[item.key] = [item]
        return item

    def peek(self) -> WorkItem | None:
        heads = [lane[0] for lane in self._lanes.values()]
        return min(heads)[1] if heads else None

    def upcoming(self, num: int) -> tuple[WorkItem, ...]:
        """About the next `num` items; others that come soon may stand in for some, since a heap is not searched."""
        soon = [entry for lane in self._lanes.values() for entry in lane[: 2 * num]]
        return tuple(item for _, item in sorted(soon, key=lambda entry: entry[0])[:num])

    def lanes(self) -> tuple[Lane, ...]:
        """What waits, by the GPUs that it needs at least."""
        return tuple(Lane(lane[0][1], len(lane), self._lane_s[num_gpus]) for num_gpus, lane in self._lanes.items())

    def waiting(self) -> tuple[WorkItem, ...]:
        """All that waits, in the order it would be handed out."""
        entries = [entry for lane in self._lanes.values() for entry in lane]
        return tuple(item for _, item in sorted(entries, key=lambda entry: entry[0]))

    def speculate(self, item: WorkItem) -> WorkItem:
        """A rival of `item`, which is in flight: another attempt at the same key, from now on in flight as well."""
        rival = self._opened(item)
        self._in_flight[item.key].append(rival)
        return rival

    def rivals(self, item: WorkItem) -> list[WorkItem]:
        """The other attempts in flight at the key of `item`."""
        return [other for other in self._in_flight.get(item.key, []) if other.attempt != item.attempt]

    def is_in_flight(self, item: WorkItem) -> bool:
        return any(other.attempt == item.attempt for other in self._in_flight.get(item.key, []))

    def settle(self, item: WorkItem) -> list[WorkItem]:
        """`item` is done for good, and its rivals are in flight no more; returns the twins that share its video."""
        for attempt in self._in_flight.pop(item.key):
            self._close(attempt)
        return self._twins.pop(item.key, [])

    def drop(self, item: WorkItem) -> bool:
        """An attempt has ended without a clip. True if a rival still tries, so that nothing is to be decided."""
        attempts = self._in_flight[item.key]
        self._close(item)
        attempts[:] = [other for other in attempts if other.attempt != item.attempt]
        if attempts:
            return True
        del self._in_flight[item.key]
        return False

    def set_aside(self, item: WorkItem) -> None:
        """A dropped item will not be tried again in this run. Its first twin takes its place: only the id differs,
        but the row has its own right to be tried."""
        twins = self._twins.pop(item.key, [])
        if twins:
            self._wait(twins[0])
            self._twins[item.key] = twins[1:]

    def take_back(self, item: WorkItem) -> None:
        """A dropped item goes back to its place in the order."""
        self._wait(item)

    def num_attempts(self, item: WorkItem) -> int:
        """How many attempts at this row were handed out so far."""
        return self._attempts[item.request.id]

    @cached_property
    def num_forms(self) -> int:
        """How many forms of clips this queue was made of: sizes, lengths, recipes, wishes. Most nights nobody asks."""
        return len({item.request.form for item in self._items})

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def in_flight(self) -> list[WorkItem]:
        return [item for attempts in self._in_flight.values() for item in attempts]

    def unfinished(self) -> list[WorkItem]:
        """One item for everything that is neither settled nor set aside, in the order it would run."""
        twins = [twin for group in self._twins.values() for twin in group]
        return [*(attempts[0] for attempts in self._in_flight.values()), *self.waiting(), *twins]

    @property
    def is_empty(self) -> bool:
        return not self.num_waiting and not self._in_flight

    def _wait(self, item: WorkItem) -> None:
        lane = needed_gpus(item)
        heapq.heappush(self._lanes.setdefault(lane, []), (self._place(item), item))
        self._lane_s[lane] += item.estimate.gpu_seconds
        self.num_waiting += 1
        self.version += 1

    def _wait_no_more(self, item: WorkItem) -> None:
        num_gpus = needed_gpus(item)
        lane = self._lanes[num_gpus]
        if lane[0][1] is item:
            heapq.heappop(lane)
        else:
            lane[:] = [entry for entry in lane if entry[1] is not item]
            heapq.heapify(lane)
        if not lane:
            del self._lanes[num_gpus]
        self._lane_s[num_gpus] -= item.estimate.gpu_seconds
        self.num_waiting -= 1
        self.version += 1

    def _opened(self, item: WorkItem) -> WorkItem:
        self.num_open += 1
        self.version += 1
        self.open_usd += item.estimate.cost_usd
        self.open_gpu_seconds += item.estimate.gpu_seconds
        self.open_on[item.layout] += 1
        self._attempts[item.request.id] += 1
        return replace(item, attempt=self._attempts[item.request.id])

    def _close(self, item: WorkItem) -> None:
        self.num_open -= 1
        self.version += 1
        self.open_usd -= item.estimate.cost_usd
        self.open_gpu_seconds -= item.estimate.gpu_seconds
        self.open_on[item.layout] -= 1

    def _place(self, item: WorkItem) -> Place:
        longest_s, first_row = self._sets[_set_of(item)]
        request = item.request
        return (-request.priority, -longest_s, first_row, -item.estimate.gpu_seconds, request.row_index)


def _set_of(item: WorkItem) -> AdapterSet:
    request = item.request
    return request.priority, request.recipe, tuple((use.sha256, use.strength) for use in request.wishes.adapters)
