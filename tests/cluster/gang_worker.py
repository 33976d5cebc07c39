"""A test engine that holds a process group and memory as a parallel renderer would: NCCL on GPUs, gloo on CPU.

Every step of an item is one all_reduce of all ranks, so a rank that is killed leaves the others in a collective.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.cluster.assignment import Assignment
from pipeline.cost.meter import Meter
from pipeline.errors import Cancelled, fault_of
from pipeline.records.gang import Member
from pipeline.records.outcome import Failed, Outcome, Rendered, Timings
from tests.unit.makers import asset

# Longer than any test: that a peer is gone must be noticed by the pool, not by the library.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class GangFactory:
    """Makes ranks that hold `num_gb` (1e9 bytes) on their GPU and take `num_steps` steps of `step_s` for each item.

    At a quarter of an attempt each rank writes its pid to `<marks>/<row>.<attempt>.<rank>`, if there is such a folder.
    """

    device: str = "cpu"
    num_gb: float = 0.0
    num_steps: int = 20
    step_s: float = 0.05
    marks: Path | None = None

    def __call__(self, meter: Meter, member: Member) -> GangWorker:
        meter.enter("weight_load")
        store = dist.TCPStore(
            member.host,
            member.port,
            member.num_ranks,
            is_master=member.is_leader,
            master_listen_fd=member.listen_fd,
            wait_for_workers=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
        # Ray shows each rank its own GPU only, as number 0.
        device = torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")
        if self.device == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            store=store,
            rank=member.rank,
            world_size=member.num_ranks,
            timeout=COLLECTIVE_TIMEOUT,
        )
        weights = torch.ones(int(self.num_gb * 1e9) if self.device == "cuda" else 0, dtype=torch.uint8, device=device)
        dist.all_reduce(torch.ones(1, device=device))  # NCCL connects its ranks with the first one
        return GangWorker(self, meter, member, device, weights)


@dataclass
class GangWorker:
    """One rank. What ranks hear of a cancellation they exchange in the step's collective, so they give up together."""

    factory: GangFactory
    meter: Meter
    member: Member
    device: torch.device
    weights: torch.Tensor
    _started_ns: int = field(default=0, init=False)

    def execute(self, assignment: Assignment) -> None:
        item = assignment.item
        self._started_ns = self.meter.now_ns()
        self.meter.enter("denoise", id=item.request.id, attempt=item.attempt)
        outcome: Outcome | None
        try:
            self._steps(assignment)
            outcome = self._rendered(item) if self.member.is_leader else None
        except Exception as error:  # noqa: BLE001 - the row's failure, whatever it is
            outcome = Failed(
                item, type(error).__name__, str(error), fault_of(error), self._started_ns, self.meter.now_ns()
            )
        self.meter.enter("idle")
        assignment.end(outcome)

    def _steps(self, assignment: Assignment) -> None:
        for step in range(1, self.factory.num_steps + 1):
            is_cancelled = torch.zeros(1, device=self.device)
            try:
                assignment.beat("denoise", step, self.factory.num_steps)
            except Cancelled:
                is_cancelled += 1
            dist.all_reduce(is_cancelled)
            if is_cancelled.item():
                raise Cancelled(f"given up at step {step}")
            if self.factory.marks is not None and step == self.factory.num_steps // 4:
                name = f"{assignment.item.request.id}.{assignment.item.attempt}.{self.member.rank}"
                (self.factory.marks / f"new-{name}").write_text(str(os.getpid()))
                (self.factory.marks / f"new-{name}").rename(self.factory.marks / name)
            time.sleep(self.factory.step_s)

    def _rendered(self, item: Any) -> Rendered:
        return Rendered(
            item, asset(item.request.id), Timings(), self._started_ns, self.meter.now_ns(), item.request.prompt
        )
