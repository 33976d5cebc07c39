"""What a rank's process tells the driver: who it is, what happened in it, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cluster.assignment import Beat
from pipeline.cluster.gpu_memory import GpuUse
from pipeline.cluster.node_agent import Process
from pipeline.records.outcome import LedgerEntry, Outcome


@dataclass(frozen=True)
class Hello:
    """Who the process is. `born_ns` is when it could first run our code, by its own clock; `port` is where it listens,
    if it leads; `gpus` is what was in use on its GPU before its worker."""

    process: Process
    ray_node_id: str
    node_name: str
    born_ns: int
    port: int
    gpus: tuple[GpuUse, ...]


@dataclass(frozen=True)
class Sign:
    """The last sign of life of an attempt in the rank's hands, and how long ago it was."""

    key: str
    attempt: int
    beat: Beat
    silent_s: float


@dataclass(frozen=True)
class Report:
    """What happened since the last report. `running` is as if it ended now; `released_ns` only in the last one.

    `num_taken` counts the items handed in so far: `is_free` says nothing of one that is still on its way.
    """

    outcomes: tuple[Outcome, ...]
    error: BaseException | None
    closed: tuple[LedgerEntry, ...]
    running: LedgerEntry | None
    is_ready: bool
    num_taken: int
    is_free: bool
    signs: tuple[Sign, ...]
    released_ns: int | None = None
