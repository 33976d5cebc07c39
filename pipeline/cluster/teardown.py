"""The end of a worker's processes, wherever they are: killed, seen to be gone, their place given back.

Each worker is torn down on a thread of its own, because a killed process may take seconds to let go of its GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.node_agent import FREE_S, GONE_S, Cleared, HeldMemory, NodeAgent, Process, end_processes
from pipeline.cluster.placement import give_up, give_up_all
from pipeline.cluster.worker_group import WorkerGroup

# An agent that was never needed before has to start first.
AGENT_S = 30.0
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class TornDown:
    """How a worker's end went. `cleared` is None if its node is gone, or nobody there answered."""

    group: WorkerGroup
    cleared: Cleared | None
    place_free_s: float

    @property
    def trouble(self) -> str | None:
        """Why nothing may be started in its place."""
        if self.cleared is None:
            return None
        if self.cleared.alive:
            pids = ", ".join(map(str, self.cleared.alive))
            return f"{self.group.group_id}: process {pids} was killed and is still there after {GONE_S:g} s"
        if self.cleared.held:
            gpus = "; ".join(map(_still_holds, self.cleared.held))
            return f"{self.group.group_id} was ended, and {FREE_S:g} s later {gpus}; end what holds it, then run again"
        return None

    @property
    def remains(self) -> dict[str, Any]:
        """What is still there, for the event log."""
        assert self.cleared is not None, "there is trouble"
        gpus = [{"gpu": of.gpu.uuid, "held_bytes": of.gpu.used_bytes, "pids": of.pids} for of in self.cleared.held]
        return {"alive": self.cleared.alive, "gpus": gpus}


class NodeAgents:
    """A NodeAgent on each node that holds workers: in this process for its own node, else an actor without resources.

    An actor is asked for when the node's first worker is there: once a node drains none can start.
    """

    def __init__(self) -> None:
        self._here = ray.get_runtime_context().get_node_id()
        self._actors: dict[str, Any] = {}
        self._lock = threading.Lock()

    def prepare(self, node_id: str) -> None:
        if node_id != self._here:
            self._actor(node_id)

    def clear(self, group: WorkerGroup, is_over: threading.Event) -> Cleared | None:
        hellos = [rank.hello for rank in group.ranks if rank.hello is not None]
        processes = tuple(hello.process for hello in hellos)
        gpus = tuple(use for hello in hellos for use in hello.gpus)
        node_id = group.node_id
        if node_id is None or node_id == self._here:
            return NodeAgent().clear(processes, gpus, is_over.is_set)
        for is_last_try in (False, True):
            try:
                answer = self._actor(node_id).clear.remote(processes, gpus).future()
                return _wait(answer, AGENT_S + GONE_S + FREE_S, is_over)
            except RayError:
                self._forget(node_id)
                if is_last_try or is_over.is_set() or not _is_alive(node_id):
                    break
        return None

    def kill(self, groups: Iterable[WorkerGroup], timeout_s: float) -> None:
        """End the processes of workers wherever they are, and wait no longer than that for their end."""
        processes: dict[str, list[Process]] = {}
        for hello in (rank.hello for group in groups for rank in group.ranks if rank.hello is not None):
            processes.setdefault(hello.ray_node_id, []).append(hello.process)
        here = processes.pop(self._here, [])
        elsewhere = [(self._actors.get(node_id), tuple(found)) for node_id, found in processes.items()]
        answers = [agent.clear.remote(found, ()).future() for agent, found in elsewhere if agent is not None]
        end_processes(tuple(here), timeout_s)
        wait(answers, timeout_s)

    def _actor(self, node_id: str) -> Any:
        with self._lock:
            if node_id not in self._actors:
                where = NodeAffinitySchedulingStrategy(node_id, soft=False)
                agent = ray.remote(NodeAgent).options(num_cpus=0, max_concurrency=8, scheduling_strategy=where)
                self._actors[node_id] = agent.remote()
            return self._actors[node_id]

    def _forget(self, node_id: str) -> None:
        with self._lock:
            self._actors.pop(node_id, None)


class Teardown:
    """Tears workers down; each that is done is told to `on_done`, on its thread."""

    def __init__(self, on_done: Callable[[TornDown], None]) -> None:
        self._agents = NodeAgents()
        self._on_done = on_done
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, group: WorkerGroup) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._run, args=(group,), name=f"end-{group.group_id}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def prepare(self, node_id: str) -> None:
        """A worker is on that node."""
        self._agents.prepare(node_id)

    def stop(self, groups: Collection[WorkerGroup], timeout_s: float) -> None:
        """End `groups`, and those that are being torn down, without waiting for memory; with Ray, which is left next,
        ends what there was no time for. A call after that would start another Ray, so the threads must be over."""
        self._is_over.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._agents.kill(groups, timeout_s)
        give_up_all((group.place for group in groups), timeout_s)

    def _run(self, group: WorkerGroup) -> None:
        asked_s = time.monotonic()
        for rank in group.ranks:
            with suppress(RayError):
                ray.kill(rank.actor, no_restart=True)
        cleared = self._agents.clear(group, self._is_over)
        if self._is_over.is_set():
            return
        done = TornDown(group, cleared, time.monotonic() - asked_s)
        if done.trouble is None:
            with suppress(RayError):
                give_up(group.place)
        self._on_done(replace(done, place_free_s=time.monotonic() - asked_s))


def _still_holds(held: HeldMemory) -> str:
    by = f"process {', '.join(map(str, held.pids))}" if held.pids else "no process that is seen here"
    return f"GPU {held.gpu.uuid} still holds {held.gpu.used_bytes} bytes more than before it, held by {by}"


def _wait(answer: Future[Cleared], timeout_s: float, is_over: threading.Event) -> Cleared | None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and not is_over.is_set():
        with suppress(TimeoutError):
            return answer.result(LOOK_EVERY_S)
    return None


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
