"""What one rank of a gang does: each contestant on one device first, then spread over all, outputs before times.

Rank 0 leads: while the others wait, it finds what each contestant computes and takes on one device. Then all build,
call and time the spread contestants together, in the same order. Whatever can fail on one rank alone is followed by a
vote, so that all leave it out or none does. Times are rank 0's, from a moment at which all ranks are ready.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch

from pipeline.bench.gang_entrants import Entrant
from pipeline.bench.gang_exchanges import exchanges
from pipeline.bench.gang_job import Broken, Done, GangJob, Listening, Measured, Raised, Working
from pipeline.bench.tiers import Built, Case, Step, Velocities, Weights
from pipeline.bench.timing import TIMED_A_TURN, TURNS, difference, failure_of, forget, num_bytes, seconds_of, spread
from pipeline.errors import UsageError
from pipeline.geometry import LatentShape
from pipeline.parallel.consent import GangConsent
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.start import join, leave
from pipeline.parallel.tensor import TensorParallel
from pipeline.planning.estimate import denoiser_flops
from pipeline.records.gang import Member

log = logging.getLogger("pipeline.bench")
# A step of so many tokens takes most of a second or more on any layout: it needs no untimed one before it in each turn.
_LONG_TOKENS = 16_384
T = TypeVar("T")
Tell = Callable[[object], None]


def serve(pipe: Connection, rank: int, job: GangJob) -> None:
    """The life of a rank: meet the others, measure, leave. Ends with the process that started it."""
    if job.device == "cpu":
        torch.set_num_threads(1)
    member = _member(pipe, rank)
    Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        pipe.send(Working("the ranks met"))
        groups = join(member, job.layout, f"cuda:{rank}" if job.device == "cuda" else job.device, job.collective_s)
        with torch.inference_mode():
            _Rank(job, groups, pipe.send).measure()
        pipe.send(Done())
    except Exception as error:
        log.warning("rank %d ends", rank, exc_info=True)
        pipe.send(Broken(failure_of(error)["failure"]))
        # To leave would be to wait for ranks that may wait for this one.
        os._exit(1)
    leave(groups)


def _member(pipe: Connection, rank: int) -> Member:
    """Who this rank is. The leader takes the port at which all meet, so that nobody else can."""
    if rank:
        return _received(pipe)
    listening = socket.create_server(("127.0.0.1", 0))
    pipe.send(Listening(listening.getsockname()[1]))
    return replace(_received(pipe), listen_fd=listening.detach())


def _received(pipe: Connection) -> Member:
    member = pipe.recv()
    assert isinstance(member, Member)
    return member


def _end_with_parent(pipe: Connection) -> None:
    """Nothing is sent after the beginning: what can be read is the pipe's end."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


class _Solo(NamedTuple):
    """One device alone at one shape: what contestants compute there, and facts of those that are timed; by name."""

    outputs: dict[str, Velocities]
    facts: dict[str, dict[str, Any]]


class _Rank:
    """One rank's part of a measurement; `tell` reports to the process that started it."""

    def __init__(self, job: GangJob, groups: RankGroups, tell: Tell) -> None:
        self._job = job
        self._groups = groups
        self._tell = tell
        self._lowest = GangConsent()
        known: Mapping[str, Entrant] = job.entrants(groups, job.config)
        self._entrants = {name: known[name] for name in job.contestants}

    def measure(self) -> None:
        job = self._job
        is_cut = job.layout.tensor > 1
        weights: Weights | None = None
        self._tell(Working("weights were drawn"))
        if self._groups.is_leader or not is_cut:
            weights = self._drawn()
        solos = self._measure_alone(weights) if weights is not None and self._groups.is_leader else {}
        self._lowest(1)
        if is_cut:
            weights = None
            forget(job.device)
            tensor, audio_tensor = self._groups.tensor.group, self._groups.audio_tensor.group
            assert tensor is not None and audio_tensor is not None, "several ranks are a group"
            weights = self._drawn(TensorParallel(tensor, audio_tensor))
        assert weights is not None
        self._hparams = weights.hparams
        built = {}
        for name, entrant in self._entrants.items():
            made = self._attempt("built", name, partial(entrant.spread.build, weights))
            if made is not None:
                built[name] = made
        for label, shape in job.shapes.items():
            self._measure_shape(label, weights.case(shape), built, solos.get(label))

    def _drawn(self, sharding: TensorParallel | None = None) -> Weights:
        return Weights(self._job.config["transformer"], self._job.model, self._job.device, sharding)

    def _measure_alone(self, weights: Weights) -> dict[str, _Solo]:
        """On this device alone, by shape: what is right, and what each contestant that is there computes and takes."""
        timed = {entrant.alone.name: entrant.alone for entrant in self._entrants.values() if entrant.alone is not None}
        judges = {entrant.judge.name: entrant.judge for entrant in self._entrants.values()}
        failures: dict[str, dict[str, Any]] = {}
        built: dict[str, Built] = {}
        for name, contestant in (judges | timed).items():
            made = self._tried("built", name, partial(contestant.build, weights), failures, name in judges)
            if made is not None:
                built[name] = made
        return {
            label: self._solo(weights.case(shape), built, timed.keys() - judges.keys(), dict(failures))
            for label, shape in self._job.shapes.items()
        }

    def _solo(
        self, case: Case, built: Mapping[str, Built], may_fail: Collection[str], facts: dict[str, dict[str, Any]]
    ) -> _Solo:
        steps: dict[str, Step] = {}
        outputs: dict[str, Velocities] = {}
        for name, made in built.items():
            entered = self._tried("called", name, partial(self._entered, made, case), facts, name not in may_fail)
            if entered is not None:
                steps[name], outputs[name] = entered
        timed = {entrant.alone.name for entrant in self._entrants.values() if entrant.alone is not None}
        for name, all_s in self._in_turns({n: s for n, s in steps.items() if n in timed}, case.shape).items():
            facts[name] = spread(all_s) | {"weights_bytes": num_bytes(built[name].module)}
        return _Solo(outputs, facts)

    def _tried(
        self, doing: str, name: str, work: Callable[[], T], failures: dict[str, dict[str, Any]], is_needed: bool
    ) -> T | None:
        """On one device alone. Whoever fails there may fit several, but nothing can be said without what is needed."""
        self._tell(Working(f"{doing} on one device", self._known(name)))
        try:
            return work()
        except Exception as error:
            if is_needed:
                raise
            log.warning("%s failed as it was %s on one device", name, doing, exc_info=True)
            failures[name] = dict(failure_of(error))
        forget(self._job.device)
        return None

    def _known(self, name: str) -> str | None:
        """The contestant of this name, if it is one: on one device there are also those that only judge."""
        return name if name in self._entrants else None

    def _measure_shape(self, label: str, case: Case, built: Mapping[str, Built], solo: _Solo | None) -> None:
        """All contestants at one shape. Only the leader has a `solo`, and tells what was found."""
        steps: dict[str, Step] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, made in built.items():
            entered = self._attempt("compared", name, partial(self._entered, made, case))
            if entered is None:
                continue
            step, velocities = entered
            facts[name] = {} if solo is None else self._compared(name, velocities, solo)
            facts[name]["weights_bytes"] = num_bytes(made.module)
            if self._lowest(int("not_comparable" not in facts[name])):
                steps[name] = step
        times = self._in_turns(steps, case.shape, self._ready)
        exchanged = self._exchanged(case)
        if solo is not None:
            for name, all_s in times.items():
                facts[name] = self._rated(name, all_s, case.shape, facts[name].get("alone", {})) | facts[name]
            self._tell(Measured(label, facts, exchanged))

    def _entered(self, built: Built, case: Case) -> tuple[Step, Velocities]:
        """A step of the case and what it computes, all of it done when this returns."""
        step = built.bind(case)
        velocities = step()
        if self._job.device == "cuda":
            torch.cuda.synchronize()
        return step, velocities

    def _compared(self, name: str, velocities: Velocities, solo: _Solo) -> dict[str, Any]:
        """How far it is from what is right, and from the same on one device."""
        entrant = self._entrants[name]
        right = _differences(velocities, solo.outputs[entrant.judge.name])
        facts: dict[str, Any] = {"difference": right}
        if entrant.alone is not None:
            facts["alone"] = solo.facts[entrant.alone.name]
            if entrant.alone.name in solo.outputs:
                facts["against_alone"] = _differences(velocities, solo.outputs[entrant.alone.name])
        worst, bound = max(found["relative"] for found in right.values()), entrant.spread.bound
        # A comparison with NaN is false.
        if not worst <= bound:
            facts["not_comparable"] = f"results must be within {bound} of {entrant.judge.name} on one device, " \
                                      f"got {worst:.3g}"  # fmt: skip
        return facts

    def _rated(self, name: str, all_s: list[float], shape: LatentShape, alone: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds on all devices, and what they are of those on one."""
        facts = spread(all_s)
        alone_s = alone.get("median_s")
        if alone_s is not None:
            facts["speed_up"] = alone_s / facts["median_s"]
        if self._entrants[name].is_step:
            flops = denoiser_flops(self._job.model.size, shape)
            facts["tflops_a_gpu"] = flops / facts["median_s"] / self._job.layout.num_gpus / 1e12
        return facts

    def _exchanged(self, case: Case) -> dict[str, dict[str, Any]]:
        """Seconds of a step's exchanges of the video alone, by axis, nothing computed between them."""
        calls = exchanges(self._groups, self._hparams, case.shape, self._job.device)
        self._tell(Working("exchanges were timed"))
        times = self._in_turns(calls, case.shape, self._ready)
        return {axis: spread(all_s) for axis, all_s in times.items()}

    def _attempt(self, doing: str, name: str, work: Callable[[], T]) -> T | None:
        """What all ranks do alike; None, on all of them, if it failed on one."""
        self._tell(Working(doing, name))
        result, failed = None, False
        try:
            result = work()
        except Exception as error:
            # Who cannot take part at all says so in one line.
            log.warning("%s failed as it was %s", name, doing, exc_info=not isinstance(error, UsageError))
            self._tell(Raised(name, failure_of(error)["failure"]))
            failed = True
        if self._lowest(int(not failed)):
            return result
        forget(self._job.device)
        return None

    def _ready(self) -> None:
        """No rank has work left from before."""
        if self._job.device == "cuda":
            torch.cuda.synchronize()
        self._lowest(1)

    def _in_turns(
        self, calls: Mapping[str, Callable[[], object]], shape: LatentShape, ready: Callable[[], None] = lambda: None
    ) -> dict[str, list[float]]:
        """Seconds of each call by name, as `timing.in_turns`; `ready` brings ranks together before each timed one."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                self._tell(Working("timed", self._known(name)))
                if shape.num_video_tokens < _LONG_TOKENS:
                    call()
                for _ in range(TIMED_A_TURN):
                    ready()
                    found[name].append(seconds_of(call, self._job.device))
        return found


def _differences(got: Velocities, wanted: Velocities) -> dict[str, dict[str, float]]:
    pairs = zip(("video", "audio"), got, wanted, strict=True)
    return {stream: difference(x, best) for stream, x, best in pairs if x is not None and best is not None}
