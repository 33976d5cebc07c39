"""How much room there is for workers: ranks that each node holds, places that are spoilt, if waiting is in vain."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping

from pipeline.cluster import placement
from pipeline.cluster.worker_group import WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

COUNT_NODES_EVERY_S = 5.0


class Room:
    """Times are monotonic, in seconds."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        # Ended, but something of theirs is still there. They keep their places, so that Ray gives these to nobody.
        self.spoilt: list[WorkerGroup] = []
        self._nodes: Mapping[str, int] = {}
        self._count_at_s = 0.0
        self._moved_s = 0.0
        self._has_warned = False
        # The most ranks that a worker finds together: fewer than a node has where others hold the rest.
        self.widest: int | None = None

    def nodes(self, draining: Mapping[str, int], now_s: float) -> Mapping[str, int]:
        """How many ranks each node may hold. The nodes are counted now and then."""
        if now_s >= self._count_at_s:
            self._count_at_s = now_s + COUNT_NODES_EVERY_S
            nodes = self._count(draining)
            if nodes != self._nodes:
                self._nodes, self.widest = nodes, None
        return self._nodes

    def count_again(self) -> None:
        """The nodes, or their places, are not what they were."""
        self._count_at_s = 0.0

    def move(self, now_s: float) -> None:
        """A worker found a place or left one: whoever still waits has a new chance."""
        self._moved_s = now_s

    def spoil(self, group: WorkerGroup) -> None:
        """The place of `group` must not be used again."""
        self.spoilt.append(group)
        self.count_again()

    def is_none_left(self, draining: Mapping[str, int]) -> bool:
        """If every place that the cluster has is spoilt."""
        return bool(self.spoilt) and not any(self._count(draining).values())

    def check(self, groups: Collection[WorkerGroup], now_s: float, *, is_any_leaving: bool) -> None:
        """Raises PipelineError if nobody has a place, nobody is about to free one, and none came free for too long.

        While some have one the job goes on, and the others may still come. Where narrower workers would do, the job
        goes on with these, until the nodes change.
        """
        timeout_s = self._plan.start_timeout_s
        late = [group for group in groups if not group.is_placed and now_s - group.asked_s > timeout_s]
        if not late:
            return
        blocked = self._blocked(late, groups) if self._plan.can_narrow and not is_any_leaving else []
        if blocked:
            self.widest = min(blocked) - 1
            log.warning("going on with workers of at most %d: %s", self.widest, self._shortage(late, len(groups)))
            return
        if any(group.is_placed for group in groups):
            if not self._has_warned:
                self._has_warned = True
                log.warning("going on with fewer workers: %s", self._shortage(late, len(groups)))
        elif len(late) == len(groups) and not is_any_leaving and now_s - self._moved_s > timeout_s:
            raise PipelineError(self._shortage(late, len(groups)))

    def _blocked(self, late: Collection[WorkerGroup], groups: Collection[WorkerGroup]) -> list[int]:
        """The ranks of wide workers that found no place on nodes where, but for strangers, there would be one."""
        held = Counter(group.node_id for group in groups for _ in group.ranks if group.is_placed)
        most = max((num - held[node] for node, num in self._nodes.items()), default=0)
        return [len(group.ranks) for group in late if 1 < len(group.ranks) <= most]

    def _shortage(self, late: Collection[WorkerGroup], num_asked: int) -> str:
        num_ranks = [len(group.ranks) for group in late]
        return placement.shortage(self._plan, num_ranks, num_asked, placement.nodes_now())

    def _count(self, draining: Mapping[str, int]) -> Mapping[str, int]:
        spoilt: Counter[str] = Counter()
        for group in self.spoilt:
            spoilt[group.node_id or ""] += len(group.ranks)
        return placement.ranks_of_nodes(self._plan, draining, spoilt)
