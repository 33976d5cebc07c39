"""Where workers can be: a gang's place on one node, how many ranks its nodes hold, and what is missing for more."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.worker_plan import WorkerPlan

# A message is for a person.
MAX_NODES_SHOWN = 8

Node = tuple[str, Mapping[str, float], Mapping[str, float]]


def ask_for_place(plan: WorkerPlan, num_ranks: int) -> Any:
    """A place for a gang of `num_ranks` on one node. It may come later: what is sent there waits for it."""
    return placement_group([{plan.resource: plan.amount}] * num_ranks, strategy="STRICT_PACK")


def seat_in(place: Any, rank: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(place, rank, placement_group_capture_child_tasks=False)


def give_up(place: Any) -> None:
    """Let others have it. What still runs there is ended by Ray."""
    remove_placement_group(place)


def give_up_all(places: Iterable[Any], timeout_s: float) -> None:
    """As many as there is time for: each takes Ray some milliseconds."""
    deadline_s = time.monotonic() + timeout_s
    for place in places:
        if time.monotonic() > deadline_s:
            return
        give_up(place)


def ranks_of_nodes(plan: WorkerPlan, draining: Mapping[str, int], spoilt: Mapping[str, int]) -> dict[str, int]:
    """How many ranks each node of the cluster holds, were it empty; `spoilt` counts those whose places cannot be used."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    ranks = {node["NodeID"]: int(node["Resources"].get(plan.resource, 0.0) / plan.amount + 1e-9) for node in nodes}
    return {node_id: max(0, num - spoilt.get(node_id, 0)) for node_id, num in ranks.items()}


def nodes_now() -> list[Node]:
    """Name, total and free resources of each living node."""
    free = available_resources_per_node()
    return [
        (node["NodeManagerHostname"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def shortage(plan: WorkerPlan, late: Sequence[int], num_asked: int, nodes: Sequence[Node]) -> str:
    """What was asked for, and what each node has of it. `late` are the ranks of the workers that have no place."""
    one = f"{plan.amount:g} {plan.resource}"
    kinds = Counter(late)
    asked = [f"{n} x {one} on one node" if n > 1 else one for n in sorted(kinds, reverse=True)]
    if len(kinds) > 1:
        nums = [kinds[n] for n in sorted(kinds, reverse=True)]
        asked = [f"{each} ({num} of them)" for each, num in zip(asked, nums, strict=True)]
    shown = [
        f"{name} has {total.get(plan.resource, 0):g} {plan.resource} ({free.get(plan.resource, 0):g} free)"
        for name, total, free in nodes[:MAX_NODES_SHOWN]
    ]
    if len(nodes) > MAX_NODES_SHOWN:
        shown.append(f"and there are {len(nodes) - MAX_NODES_SHOWN} more nodes")
    fewer = "ask for fewer (cluster.num_workers)" if max(late) == 1 else "use a narrower layout (parallel)"
    return (
        f"{len(late)} of {num_asked} workers found no place within {plan.start_timeout_s:g} s; each asks for "
        f"{' or '.join(asked)}; {', '.join(shown)}; free some, {fewer}, or wait longer (cluster.start_timeout_s)"
    )
