"""The workers of a pool by layout: which are wanted, which are free, what their starts took, and so what should move.

Calls no actor and knows no Ray. The pool says what is there and does what comes out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from pipeline.cluster.balance import Balance, Moves, Standing
from pipeline.cluster.worker_group import WorkerGroup
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.planning.timetable import Fleet
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem


class Staffing:
    """Times are monotonic, in seconds; `nodes` are the ranks that each node may hold."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._wanted: Mapping[ParallelLayout, int] = {}
        self._num_spare = 0
        self._free: dict[ParallelLayout, dict[str, WorkerGroup]] = {}
        self._load_s = 0.0
        self._num_loads = 0
        # For the next worker and its first rank: both are counted over the whole run.
        self.num_asked = self.num_ranks_asked = 0

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int) -> bool:
        """Note the wish; says if it has grown."""
        has_grown = any(num > self._wanted.get(layout, 0) for layout, num in workers.items())
        self._wanted, self._num_spare = workers, num_spare
        return has_grown

    def num_free(self, layout: ParallelLayout) -> int:
        return len(self._free.get(layout, ()))

    def take_free(self, item: WorkItem) -> WorkerGroup:
        """The worker that has been free for longest; for an item that is to be alone, one that holds nothing else."""
        free = self._free[item.layout]
        fit = (group for group in free.values() if group.holds_nothing or not item.alone)
        return free.pop((next(fit, None) or next(iter(free.values()))).group_id)

    def note_free(self, group: WorkerGroup) -> bool:
        """It may have become free, or be so no more; says if it is since now."""
        free = self._free.setdefault(group.layout, {})
        is_news = group.is_free and group.group_id not in free
        if group.is_free:
            free.setdefault(group.group_id, group)
        else:
            free.pop(group.group_id, None)
        return is_news

    def note_load(self, seconds: float) -> None:
        """A worker's start took so long, from its place to its model."""
        self._load_s += seconds
        self._num_loads += 1

    def note_asked(self, layout: ParallelLayout) -> None:
        self.num_asked += 1
        self.num_ranks_asked += layout.num_gpus

    def fleet(self, groups: Collection[WorkerGroup], nodes: Mapping[str, int], widest: int | None) -> Fleet:
        """What there is; no worker finds more than `widest` ranks together, if that is known."""
        together = max(nodes.values(), default=0)
        most = sum(nodes.values())
        if self._plan.max_ranks is not None:
            most = min(most, self._plan.max_ranks)
        return Fleet(
            num_gpus=most,
            gpus_per_node=min(most, together if widest is None else min(together, widest)),
            load_s=self._load_s / self._num_loads if self._num_loads else self._plan.assumed_load_s,
            held=Counter(group.layout for group in groups if not group.is_draining),
        )

    def moves(
        self,
        groups: Collection[WorkerGroup],
        leaving: Collection[WorkerGroup],
        nodes: Mapping[str, int],
        now_s: float,
    ) -> Moves:
        """Missing workers to start, surplus ones to give back; those of nodes that drain are in nobody's count."""
        ending: Counter[str | None] = Counter()
        for group in leaving:
            # What never had a place takes none.
            if group.is_placed and not group.is_draining:
                ending[group.node_id] += len(group.ranks)
        standing = [
            Standing(group.group_id, group.layout, group.node_id, group.is_idle, group.is_spare(now_s))
            for group in groups
            if not group.is_draining
        ]
        return Balance(standing, ending, nodes, self._wanted, self._plan.max_ranks, self._num_spare).moves()
