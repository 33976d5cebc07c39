"""The processes of one gang, one a rank: started, listened to, and ended whatever happens to one of them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from pipeline.bench.gang_job import Broken, Done, GangJob, Listening, Measured, Raised, Working
from pipeline.bench.gang_rank import serve
from pipeline.records.gang import Member

# A rank's death is often told by another one first, whose connection to it broke.
_DEATH_S = 0.5
_END_S = 10.0


class GangLost(Exception):
    """The gang did not come to its end, and why; `contestant` is what was in hand, if it was one."""

    def __init__(self, why: str, contestant: str | None) -> None:
        super().__init__(why)
        self.contestant = contestant


def measured(job: GangJob) -> Iterator[Measured]:
    """What a gang measures, a shape at a time; a contestant that failed says why. Raises GangLost."""
    with _started(job) as world:
        yield from _Watch(job, world).measured()


class _World:
    """Pipes and processes by rank."""

    def __init__(self, job: GangJob) -> None:
        # A forked process could not use CUDA once this one has asked for it.
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[int, Connection] = {}
        self.processes: dict[int, SpawnProcess] = {}
        for rank in range(job.layout.num_gpus):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, job), name=f"gang rank {rank}")
            process.start()
            # This end is the rank's alone, so that its pipe ends with it.
            theirs.close()
            self._pipes[rank], self.processes[rank] = ours, process

    def send(self, rank: int, member: Member) -> None:
        self._pipes[rank].send(member)

    def receive(self, timeout_s: float) -> list[tuple[int, object]]:
        """What ranks have told by now, at most one each; None of a rank that ended. Empty after `timeout_s`."""
        ranks = {pipe: rank for rank, pipe in self._pipes.items()}
        told: list[tuple[int, object]] = []
        for pipe in wait(list(ranks), timeout_s):
            assert isinstance(pipe, Connection)
            try:
                told.append((ranks[pipe], pipe.recv()))
            except (EOFError, OSError):
                del self._pipes[ranks[pipe]]
                told.append((ranks[pipe], None))
        return told

    def end(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _started(job: GangJob) -> Iterator[_World]:
    world = _World(job)
    within_s = 0.0
    try:
        yield world
        within_s = _END_S
    finally:
        world.end(within_s)


class _Watch:
    """Follows what each rank says it does, to know what was in hand when one of them is lost."""

    def __init__(self, job: GangJob, world: _World) -> None:
        self._job = job
        self._world = world
        self._doing = {rank: Working("it started") for rank in world.processes}
        self._done: set[int] = set()
        self._reasons: dict[str, str] = {}
        # Ranks that wait for the others after something failed on them, and since when.
        self._failed_at_s: dict[int, float] = {}
        self._heard_s = time.monotonic()

    def measured(self) -> Iterator[Measured]:
        while len(self._done) < len(self._world.processes):
            for rank, message in self._world.receive(timeout_s=0.5):
                self._heard_s = time.monotonic()
                self._failed_at_s.pop(rank, None)
                if isinstance(message, Measured):
                    yield self._with_reasons(message)
                else:
                    self._follow(rank, message)
            self._require_signs_of_life()

    def _with_reasons(self, message: Measured) -> Measured:
        failed = {name: {"failure": self._reasons.get(name, "no rank said why")} for name in self._job.contestants}
        return replace(message, contestants={name: message.contestants.get(name, failed[name]) for name in failed})

    def _follow(self, rank: int, message: object) -> None:
        match message:
            case Listening(port):
                for other in self._world.processes:
                    num_ranks = len(self._world.processes)
                    self._world.send(other, Member(other, num_ranks, "127.0.0.1", port, layout=self._job.layout))
            case Working():
                self._doing[rank] = message
            case Raised(contestant, why):
                self._reasons.setdefault(contestant, f"rank {rank}: {why}")
                self._failed_at_s[rank] = time.monotonic()
            case Done():
                self._done.add(rank)
            case Broken(why):
                raise self._lost(rank, f"rank {rank}: {why}")
            case None if rank not in self._done:
                raise self._lost(rank, "")

    def _require_signs_of_life(self) -> None:
        now_s, job = time.monotonic(), self._job
        for rank, since_s in self._failed_at_s.items():
            if now_s - since_s > job.grace_s:
                contestant = self._doing[rank].contestant
                why = self._reasons.get(contestant or "", "it failed")
                raise GangLost(f"{why}; the others did not come to that within {job.grace_s:.0f} s", contestant)
        if now_s - self._heard_s > job.silence_s:
            raise GangLost(f"no rank gave a sign for {job.silence_s:.0f} s while {self._doing[0]}",
                           self._doing[0].contestant)  # fmt: skip

    def _lost(self, rank: int, why: str) -> GangLost:
        """With the exit codes of all other ranks that ended: one that breaks off often does so for another's death."""
        time.sleep(_DEATH_S)
        codes = {other: process.exitcode for other, process in self._world.processes.items()}
        deaths = [f"rank {other} ended with exit code {code}" for other, code in codes.items()
                  if code is not None and not (why and other == rank)]  # fmt: skip
        reasons = "; ".join(filter(None, [why, *deaths]))
        return GangLost(f"{reasons} while {self._doing[rank]}", self._doing[rank].contestant)
