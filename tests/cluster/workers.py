"""Workers that do as their item's prompt says, without torch. Imported in actors, so they lie in a module."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.assignment import Assignment
from pipeline.cost.meter import Meter
from pipeline.errors import CheckpointMismatch, EngineFault, fault_of
from pipeline.records.gang import Member
from pipeline.records.outcome import Failed, Rendered, Timings
from tests.unit.makers import asset

EXIT_STATUS = 17
STEP_S = 0.05
TROUBLE_AT_STEP = 8


@dataclass(frozen=True)
class Order:
    """`<verb> [<seconds>] [rank <r>] [once <path>]`: what to do, and which rank; with a path, only if it is not there.

    `render` renders; all others render, but at their eighth step `die` ends the process, `freeze` stops it, `loop`
    goes on for ever without a sign, `fail` raises.
    """

    verb: str
    seconds: float
    rank: int
    path: Path | None

    @classmethod
    def of(cls, prompt: str) -> Order:
        verb, *words = prompt.split()
        seconds = float(words.pop(0)) if words and words[0] not in ("rank", "once") else 12 * STEP_S
        facts = dict(zip(words[::2], words[1::2], strict=True))
        return cls(verb, seconds, int(facts.get("rank", 0)), Path(facts["once"]) if "once" in facts else None)

    def is_due(self, rank: int) -> bool:
        if rank != self.rank or (self.path is not None and self.path.exists()):
            return False
        if self.path is not None:
            self.path.touch()
        return True


@dataclass
class ObedientWorker:
    """One rank; the ranks of a gang do not wait for each other."""

    meter: Meter
    member: Member

    def execute(self, assignment: Assignment) -> None:
        item = assignment.item
        started_ns = self.meter.now_ns()
        self.meter.enter("denoise", id=item.request.id, attempt=item.attempt)
        try:
            self._work(Order.of(item.request.prompt), assignment)
        except Exception as error:  # noqa: BLE001 - the row's failure, whatever it is
            self.meter.enter("idle")
            assignment.end(
                Failed(item, type(error).__name__, str(error), fault_of(error), started_ns, self.meter.now_ns())
            )
            return
        self.meter.enter("idle")
        timings = Timings(text_encode_s=float(os.getpid()))
        rendered = Rendered(item, asset(item.request.id), timings, started_ns, self.meter.now_ns(), item.request.prompt)
        assignment.end(rendered if self.member.is_leader else None)

    def _work(self, order: Order, assignment: Assignment) -> None:
        num_steps = max(1, round(order.seconds / STEP_S))
        for step in range(1, num_steps + 1):
            assignment.beat("denoise", step, num_steps)
            time.sleep(STEP_S)
            if step == TROUBLE_AT_STEP and order.verb != "render" and order.is_due(self.member.rank):
                _make_trouble(order.verb)


def _make_trouble(verb: str) -> None:
    if verb == "die":
        os._exit(EXIT_STATUS)
    if verb == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if verb == "fail":
        raise EngineFault("not finite")
    assert verb == "loop", verb
    while True:
        pass


def obedient(meter: Meter, member: Member) -> ObedientWorker:
    meter.enter("weight_load")
    time.sleep(0.05)
    return ObedientWorker(meter, member)


def mismatched(meter: Meter, member: Member) -> ObedientWorker:
    raise CheckpointMismatch("tensors differ: 3 missing")


def buggy(meter: Meter, member: Member) -> ObedientWorker:
    raise ZeroDivisionError("oops")


@dataclass(frozen=True)
class OnceBroken:
    """Makes obedient workers, but the first one, which leaves `path`, meets `error` in its set-up."""

    path: Path
    error: Exception

    def __call__(self, meter: Meter, member: Member) -> ObedientWorker:
        if not self.path.exists():
            self.path.touch()
            # Until another one is on its way, however busy the machine is.
            end_s = time.monotonic() + 30
            while not self.path.with_suffix(".other").exists() and time.monotonic() < end_s:
                time.sleep(0.05)
            raise self.error
        self.path.with_suffix(".other").touch()
        return obedient(meter, member)


def dying(meter: Meter, member: Member) -> ObedientWorker:
    os._exit(EXIT_STATUS)


def frozen(meter: Meter, member: Member) -> ObedientWorker:
    os.kill(os.getpid(), signal.SIGSTOP)
    raise AssertionError("nobody lets it go on")
