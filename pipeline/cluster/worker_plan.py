"""What a pool on Ray is asked for: what the ranks of its workers are, and how long they may take or be silent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.cost.pricing import UnitPrice


@dataclass(frozen=True)
class WorkerPlan:
    """A worker is a gang of processes of one node, as many as its layout has ranks: one a GPU, or `cpus_per_rank` cores
    each. All workers together have at most `max_ranks`; None: as many as the cluster holds.
    """

    run_id: str
    device: str
    price: UnitPrice
    threads: int
    max_ranks: int | None
    # How long a worker may wait for a place, and Ray for its start.
    start_timeout_s: float
    # If narrower workers can do what wider ones find no place for.
    can_narrow: bool = False
    cpus_per_rank: float = 1.0
    # A worker is taken for hung after this time without a sign of life, or later if its item's steps take long.
    hang_after_s: float = 60.0
    # Loading gives no signs: terabytes may come from a slow store.
    load_timeout_s: float = 1800.0
    # What a worker's start takes, until one has started.
    assumed_load_s: float = 0.0
    log_level: str = "warning"
    # Called with the number of nodes once it is known; raises if the job cannot run on so many.
    refuse_nodes: Callable[[int], None] = lambda num_nodes: None

    @property
    def resource(self) -> str:
        """What Ray calls a rank's place."""
        return "GPU" if self.device == "cuda" else "CPU"

    @property
    def amount(self) -> float:
        """How much of `resource` a rank takes."""
        return 1.0 if self.device == "cuda" else self.cpus_per_rank
