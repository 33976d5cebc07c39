"""Where workers can be: a gang's place on one node, how many gangs a cluster holds, and what is missing for more."""

from __future__ import annotations

import time
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


def ask_for_place(plan: WorkerPlan) -> Any:
    """A place for one gang on one node. It may come later: what is sent there waits for it."""
    return placement_group([{plan.resource: plan.amount}] * plan.num_ranks, strategy="STRICT_PACK")


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


def capacity(plan: WorkerPlan, draining: Mapping[str, int], spoilt: Mapping[str, int]) -> int:
    """How many gangs the nodes of the cluster hold, were they empty; of each node `spoilt` places cannot be used."""
    per_gang = plan.amount * plan.num_ranks
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    places = [(node["NodeID"], int(node["Resources"].get(plan.resource, 0.0) / per_gang + 1e-9)) for node in nodes]
    return sum(max(0, num_places - spoilt.get(node_id, 0)) for node_id, num_places in places)


def nodes_now() -> list[Node]:
    """Name, total and free resources of each living node."""
    free = available_resources_per_node()
    return [
        (node["NodeManagerHostname"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def shortage(plan: WorkerPlan, num_late: int, num_asked: int, nodes: Sequence[Node]) -> str:
    """What was asked for, and what each node has of it."""
    asked = f"{plan.amount:g} {plan.resource}"
    if plan.num_ranks > 1:
        asked = f"{plan.num_ranks} x {asked} on one node"
    shown = [
        f"{name} has {total.get(plan.resource, 0):g} {plan.resource} ({free.get(plan.resource, 0):g} free)"
        for name, total, free in nodes[:MAX_NODES_SHOWN]
    ]
    if len(nodes) > MAX_NODES_SHOWN:
        shown.append(f"and there are {len(nodes) - MAX_NODES_SHOWN} more nodes")
    return (
        f"{num_late} of {num_asked} workers found no place within {plan.start_timeout_s:g} s; each asks for {asked}; "
        f"{', '.join(shown)}; free some, ask for fewer (cluster.num_workers), or wait longer (cluster.start_timeout_s)"
    )
