"""Workers that do as their item's prompt says, without torch. Imported in actors, so they lie in a module."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.cost.meter import Meter
from pipeline.errors import CheckpointMismatch
from pipeline.records.outcome import Outcome, Rendered, Timings
from pipeline.records.work import WorkItem
from tests.unit.makers import asset

EXIT_STATUS = 17


@dataclass
class ObedientWorker:
    """`render <s>`; `die`: its process ends at once; `die once <path>`: unless the file is there, which it makes."""

    meter: Meter

    def execute(self, item: WorkItem) -> Outcome:
        words = item.request.prompt.split()
        started_ns = self.meter.now_ns()
        self.meter.enter("denoise", id=item.request.id, attempt=item.attempt)
        if words[0] == "die":
            time.sleep(0.4)  # long enough to be reported as running
            first = len(words) < 3 or not Path(words[2]).exists()
            if first:
                if len(words) == 3:
                    Path(words[2]).touch()
                os._exit(EXIT_STATUS)
        else:
            time.sleep(float(words[1]))
        self.meter.enter("idle")
        timings = Timings(text_encode_s=float(os.getpid()))
        return Rendered(item, asset(item.request.id), timings, started_ns, self.meter.now_ns(), item.request.prompt)


def obedient(meter: Meter) -> ObedientWorker:
    meter.enter("weight_load")
    time.sleep(0.05)
    return ObedientWorker(meter)


def mismatched(meter: Meter) -> ObedientWorker:
    raise CheckpointMismatch("tensors differ: 3 missing")


def buggy(meter: Meter) -> ObedientWorker:
    raise ZeroDivisionError("oops")


def dying(meter: Meter) -> ObedientWorker:
    os._exit(EXIT_STATUS)
