"""What must be done on a worker's own node when it is ended: kill its processes, see them gone, see its GPUs free.

Ray's own kill is not enough: a stopped process does not hear it, and what a worker started may outlive it. Knows no
Ray: `teardown` calls it in the driver's process for the driver's node, and as an actor on every other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.gpu_memory import GpuUse, holders, still_held
from pipeline.storage.processes import start_ticks

# A killed process whose GPU is busy ends when the kernel lets go of it.
GONE_S = 15.0
# A process of 60 GB gave its GPU memory back within a second; a driver under load takes longer.
FREE_S = 30.0
LOOK_EVERY_S = 0.02
LOOK_AT_GPUS_EVERY_S = 0.25


@dataclass(frozen=True)
class Process:
    """A process of a node, told from a later one of the same number by its start."""

    pid: int
    start_ticks: str | None


@dataclass(frozen=True)
class HeldMemory:
    """GPU memory that nobody gave back, and who is seen to have it."""

    gpu: GpuUse
    pids: tuple[int, ...]


@dataclass(frozen=True)
class Cleared:
    """What became of a worker's processes and memory. `memory_free_s` is None where no GPU was to be looked at."""

    processes_gone_s: float
    memory_free_s: float | None = None
    alive: tuple[int, ...] = ()
    held: tuple[HeldMemory, ...] = ()


class NodeAgent:
    """Does it on the node it lives on."""

    def clear(
        self,
        processes: tuple[Process, ...],
        gpus_before: tuple[GpuUse, ...],
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> Cleared:
        """Kill `processes` with what they started, and wait until their GPUs' memory is as it was before them."""
        asked_s = time.monotonic()
        alive = end_processes(processes, GONE_S, is_given_up)
        gone_s = time.monotonic() - asked_s
        if alive or not gpus_before:
            return Cleared(gone_s, alive=alive)
        while held := still_held(gpus_before):
            if time.monotonic() - asked_s > FREE_S or is_given_up():
                return Cleared(gone_s, held=tuple(HeldMemory(gpu, holders(gpu.uuid)) for gpu in held))
            time.sleep(LOOK_AT_GPUS_EVERY_S)
        return Cleared(gone_s, time.monotonic() - asked_s)


def end_processes(
    processes: tuple[Process, ...], timeout_s: float, is_given_up: Callable[[], bool] = lambda: False
) -> tuple[int, ...]:
    """Kill them and the members of the process groups they lead, wait for their end; the pids that are left."""
    deadline_s = time.monotonic() + timeout_s
    while left := [pid for process in processes for pid in _members(process)]:
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline_s or is_given_up():
            return tuple(left)
        time.sleep(LOOK_EVERY_S)
    return ()


def _members(leader: Process) -> list[int]:
    """The process and its group, alive. Ray makes each worker the leader of a group.

    A group's number is not given away while it has members; so if another process has it now, the group is gone.
    """
    started = start_ticks(leader.pid)
    if started is not None and started != leader.start_ticks:
        return []
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
            if int(group) == leader.pid and state != "Z":
                found.append(int(stat.parent.name))
    return found if started is None or leader.pid in found else [leader.pid, *found]
