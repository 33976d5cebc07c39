"""Kills one rank of a gang in the middle of a collective, again and again, and measures what follows.

    python -m tests.bench.gang_kills --kills 20 --ranks 4 --gb 60 --device cuda

As many gangs work at once as the machine holds. Each row's first attempt is killed, its second renders it. Prints a
JSON object with the maxima and appends it, with each kill, to `--results`; fails if a death is noticed later than after
5 s, if GPU memory is not free within 30 s, or if a row is not rendered.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import ray
import torch

from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import StopRequest
from pipeline.cluster.progress import Counts, Progress
from pipeline.cluster.ray_pool import RayPool
from pipeline.cluster.worker_plan import WorkerPlan
from pipeline.cost.meter import utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from tests.cluster.gang_worker import GangFactory
from tests.unit.makers import FACTS, item

MAX_DETECTED_S, MAX_MEMORY_FREE_S = 5.0, 30.0
TIMES = ("detected_s", "processes_gone_s", "memory_free_s", "row_done_s")
# A run that takes longer is itself a failure.
GIVE_UP_S = 540.0


class TimedLog:
    """The events of the run with the monotonic time at which the driver knew of them."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str, dict[str, Any]]] = []

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        self.events.append((time.monotonic(), event, facts))

    def set_workers(self, seats: list[WorkerSeat]) -> None: ...

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None: ...

    def first(self, event: str, **match: Any) -> tuple[float, dict[str, Any]] | None:
        for at_s, name, facts in list(self.events):
            if name == event and all(facts.get(key) == value for key, value in match.items()):
                return at_s, facts
        return None

    def first_loss_of(self, row: str) -> tuple[float, dict[str, Any]] | None:
        found = ((at_s, facts) for at_s, name, facts in list(self.events) if name == "worker_lost")
        return next(((at_s, facts) for at_s, facts in found if row in facts["ids"]), None)


def kill_ranks(marks: Path, rows: list[str], num_ranks: int, seed: int) -> dict[str, tuple[int, float]]:
    """Kill one rank of each row's first attempt once all of its ranks are at work: the rank, and when."""
    generator, killed = random.Random(seed), {}
    deadline_s = time.monotonic() + GIVE_UP_S
    while len(killed) < len(rows) and time.monotonic() < deadline_s:
        for row in rows:
            at_work = [marks / f"{row}.1.{rank}" for rank in range(num_ranks)]
            if row in killed or not all(mark.exists() for mark in at_work):
                continue
            time.sleep(generator.uniform(0.0, 0.3))
            rank = generator.randrange(num_ranks)
            killed[row] = (rank, time.monotonic())
            os.kill(int(at_work[rank].read_text()), signal.SIGKILL)
        time.sleep(0.01)
    return killed


def measure(log: TimedLog, row: str, rank: int, killed_s: float) -> dict[str, Any]:
    """Seconds from the kill to what followed it; None for what never did."""
    after: dict[str, Any] = {"row": row, "rank": rank, **dict.fromkeys(TIMES)}
    lost, done = log.first_loss_of(row), log.first("rendered", id=row)
    if done is not None:
        after["row_done_s"] = round(done[0] - killed_s, 3)
    if lost is None:
        return after
    after["detected_s"] = detected_s = round(lost[0] - killed_s, 3)
    group = lost[1]["cause"].partition(" of ")[2].partition(")")[0]
    ended = log.first("worker_torn_down", group=group)
    for name in ("processes_gone_s", "memory_free_s"):
        if ended is not None and ended[1][name] is not None:
            after[name] = round(detected_s + ended[1][name], 3)
    return after


def violations(kills: list[dict[str, Any]], rows: dict[str, str], device: str) -> list[str]:
    found = [f"{row} is {status}" for row, status in rows.items() if status != "rendered"]
    for kill in kills:
        limits = {"detected_s": MAX_DETECTED_S, "processes_gone_s": MAX_MEMORY_FREE_S}
        if device == "cuda":
            limits["memory_free_s"] = MAX_MEMORY_FREE_S
        for name, most in limits.items():
            if kill[name] is None or kill[name] > most:
                found.append(f"{kill['row']}: {name} is {kill[name]}, must be at most {most:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gb", type=float, default=60.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=20261120)
    parser.add_argument("--results", type=Path, help="a file such as tests/bench/results/gang_kills.jsonl")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    num_units = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    cpus_per_rank = min(1.0, num_units / args.ranks)
    ray.init(address="local", num_cpus=max(2, os.cpu_count() or 1), num_gpus=num_units if on_gpu else 0,
             include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
             logging_level=logging.ERROR)  # fmt: skip
    work = [replace(item(index), layout=ParallelLayout(args.ranks)) for index in range(args.kills)]
    rows = [one.request.id for one in work]
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)
        factory = GangFactory(args.device, args.gb, num_steps=24, step_s=0.05, marks=marks)
        now_ns, log = utc_clock(), TimedLog()
        plan = WorkerPlan("kills", args.device, UnitPrice("none", Decimal(0)), threads=1, max_ranks=None,
                          start_timeout_s=120.0, cpus_per_rank=cpus_per_rank)  # fmt: skip
        driver = Driver(
            queue=WorkQueue(work), pool=RayPool(factory, plan, now_ns), log=log, facts=FACTS, admission=Admission(),
            stop=StopRequest(), counts=Counts(len(work), 0, 0), progress=Progress(io.StringIO()), now_ns=now_ns,
            flush_every_s=1.0,
        )  # fmt: skip
        killed: dict[str, tuple[int, float]] = {}
        killer = threading.Thread(
            target=lambda: killed.update(kill_ranks(marks, rows, args.ranks, args.seed)), daemon=True
        )
        started_s = time.monotonic()
        killer.start()
        timer = threading.Timer(GIVE_UP_S, lambda: setattr(driver.stop, "reason", "it took too long"))
        timer.start()
        ending = driver.drive()
        timer.cancel()
        killer.join(1.0)
    kills = [measure(log, row, *killed[row]) for row in rows if row in killed]
    statuses = {row["id"]: row["status"] for row in ending.rows}
    wrong = violations(kills, statuses, args.device)
    if len(kills) < args.kills:
        wrong.append(f"{len(kills)} kills, not {args.kills}")
    summary = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{num_units}x {torch.cuda.get_device_name(0)}" if on_gpu else f"{num_units} CPU cores",
        "torch": torch.__version__, "ray": ray.__version__,
        "kills": len(kills), "ranks": args.ranks, "device": args.device, "gb": args.gb if on_gpu else 0,
        **{f"max_{name}": max((k[name] for k in kills if k[name] is not None), default=None) for name in TIMES},
        "rendered": list(statuses.values()).count("rendered"), "wall_s": round(time.monotonic() - started_s, 1),
        "stopped_by": str(ending.stopped_by or ""), "violations": wrong,
    }  # fmt: skip
    sys.stdout.write(json.dumps(summary) + "\n")
    if args.results is not None:
        with args.results.open("a") as results:
            results.write(json.dumps({**summary, "each": kills}) + "\n")
    ray.shutdown()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
