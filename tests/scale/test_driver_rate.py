"""How many outcomes a second the driver handles on one core, with its books on a disk."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import StopRequest
from pipeline.cluster.pool import Finished, PoolEvent
from pipeline.cluster.progress import Counts, Progress
from pipeline.cost.meter import utc_clock
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.planning.timetable import Fleet
from pipeline.records.outcome import LedgerEntry, WorkerSeat
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import WorkItem
from pipeline.storage.local_store import LocalStore
from pipeline.storage.runs import FLUSH_EVERY_S, RunFolder, read_events, read_run
from pipeline.storage.tables import read_ledger
from tests.unit.makers import FACTS, entry, item, rendered

NUM_WORKERS, NUM_RANKS, NUM_ITEMS = 100, 8, 3_000
STATES = ("text_encode", "denoise", "upsample", "denoise", "decode", "idle")


class InstantPool:
    """A hundred gangs of eight GPUs that end each item at once, with the ledger that they would send."""

    def __init__(self) -> None:
        self._events: deque[PoolEvent] = deque()
        self._closed: list[LedgerEntry] = []
        names = [(group, rank) for group in range(NUM_WORKERS) for rank in range(NUM_RANKS)]
        self._seats = [WorkerSeat("run-1", f"gpu-{g}-{r}", "node", f"group-{g}", r, 0, 10**18) for g, r in names]

    def start(self) -> None: ...

    def want(self, workers: Mapping[ParallelLayout, int], num_spare: int = 0) -> None: ...

    def fleet(self) -> Fleet:
        return Fleet(NUM_WORKERS, 1)

    def cancel(self, item: WorkItem) -> None: ...

    def drain(self) -> None: ...

    def stop(self, *, abandon: bool) -> None: ...

    def num_free(self, layout: ParallelLayout) -> int:
        return NUM_WORKERS - len(self._events)

    def submit(self, item: WorkItem, upcoming: Sequence[WorkItem] = ()) -> None:
        for seat in self._seats[:NUM_RANKS]:
            self._closed += [
                replace(entry(state, 0, 1, item.request.id, item.attempt), gpu_id=seat.gpu_id, rank=seat.rank)
                for state in STATES
            ]
        self._events.append(Finished(rendered(item)))

    def next_event(self, timeout_s: float) -> PoolEvent | None:
        return self._events.popleft() if self._events else None

    def seats(self) -> list[WorkerSeat]:
        return self._seats

    def take_ledger(self) -> tuple[list[LedgerEntry], list[LedgerEntry]]:
        taken, self._closed = self._closed, []
        return taken, []


def test_the_driver_handles_two_hundred_outcomes_a_second_on_one_core(tmp_path: Path) -> None:
    store, now_ns = LocalStore(tmp_path), utc_clock()
    store.prepare()
    folder = RunFolder(store, "run-1")
    folder.open({"run_id": "run-1", "state": "running", "workers": []}, now_ns())
    driver = Driver(
        queue=WorkQueue(item(index) for index in range(NUM_ITEMS)), pool=InstantPool(), log=folder, facts=FACTS,
        admission=Admission(budget_usd=1e9), stop=StopRequest(), counts=Counts(NUM_ITEMS, 0, 0),
        progress=Progress(io.StringIO()), now_ns=now_ns, flush_every_s=FLUSH_EVERY_S,
    )  # fmt: skip
    started_s = time.process_time()
    ending = driver.drive()
    cpu_s = time.process_time() - started_s
    assert len(ending.rows) == NUM_ITEMS
    assert len(read_ledger(store, "run-1")) == NUM_ITEMS * NUM_RANKS * len(STATES)
    assert sum(event["event"] == "rendered" for event in read_events(store, "run-1")) == NUM_ITEMS
    assert len(read_run(store, "run-1")["workers"]) == NUM_WORKERS * NUM_RANKS
    print(f"{NUM_ITEMS / cpu_s:.0f} outcomes a second of processor time")  # noqa: T201 - a figure of the README
    assert NUM_ITEMS / cpu_s >= 200
