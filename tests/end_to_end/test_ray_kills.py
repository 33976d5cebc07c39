"""kill -9 of drivers and of workers on Ray, at random moments of every phase: nothing lost, doubled, torn or left.

With the real model; `tests/chaos` has more kinds and numbers. The long form (`make chaos`) kills ten of each on each
store, the one of every test run three drivers and four workers in a bucket.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tests.end_to_end.checker import check_output
from tests.end_to_end.conftest import ROOT, Site, command
from tests.end_to_end.test_interruption import SEED, wait_until
from tests.end_to_end.test_ray import below, is_worker

pytestmark = pytest.mark.ray

# The phase in which each driver is killed, in random order; and how many of its workers are before: with the one of the
# last run, which goes on, ten in all in the long form.
SHORT = ["ray_starts", "workers_start", "rendering"]
LONG = ["imports"] + ["ray_starts"] * 2 + ["workers_start"] * 3 + ["rendering"] * 3 + ["closing"]
WORKERS_KILLED = {"workers_start": 2, "rendering": 1}
# After its phase has come, a driver lives on for at most so long.
LIVES_ON_S = {"imports": 1.5, "ray_starts": 3.0, "workers_start": 2.0, "rendering": 0.15, "closing": 1.0}
# Three runs that render are killed after ten clips at most.
NUM_ROWS = 36


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The temporary folder of all drivers: short, because the paths of Ray's sockets are bounded."""
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def living_in(temporary: Path) -> dict[int, str]:
    """Every process that was started with this temporary folder, or has a file open there."""
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = [str(file.readlink()) for file in (process / "fd").iterdir()]
            named += [(process / name).read_text(errors="replace") for name in ("environ", "cmdline")]
        except OSError:
            continue
        if any(str(temporary) in name for name in named):
            found[int(process.name)] = (process / "cmdline").read_text(errors="replace").strip("\0")[:80]
    return found


def check_nothing_lives_in(temporary: Path) -> None:
    deadline_s = time.monotonic() + 5
    while living := living_in(temporary):
        assert time.monotonic() < deadline_s, living
        time.sleep(0.02)


class Chaos:
    """Starts drivers on one output and kills them, and their workers, as `generator` says."""

    def __init__(self, site: Site, generator: random.Random, temporary: Path) -> None:
        self.site = site
        self.generator = generator
        self.temporary = temporary
        self.killed: set[int] = set()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(
            command("render", *self.site.arguments, "cluster=local", "cluster.num_workers=2", *arguments),
            cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**environment, "TMPDIR": str(self.temporary)},
        )  # fmt: skip

    def kill_a_driver(self, phase: str) -> str:
        """One driver from its start to its end in `phase`; returns what it said."""
        before = self.site.num_committed()
        # All of a run of one row is start and end; what else is left keeps the other runs busy until they are killed.
        process = self.start(*(["limit=1"] if phase == "closing" else []))
        if phase in ("rendering", "closing"):
            self._wait_until_committed(before + 1, process)
        else:
            wait_until(lambda: process.poll() is not None or self._has_come(phase, process.pid), 100)
        for _ in range(WORKERS_KILLED.get(phase, 0)):
            self.kill_a_worker(process)
        if phase == "rendering":
            self._wait_until_committed(before + self.generator.randint(1, 5), process)
        self._sleep(LIVES_ON_S[phase])
        process.kill()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL or (phase, process.returncode) == ("closing", 0), errors
        if self.generator.random() < 0.5:  # else the next one starts beside what is still ending
            check_nothing_lives_in(self.temporary)
        return errors

    def goes_on_without_a_worker(self) -> None:
        """A run that is not killed, but one of its workers is: it ends well."""
        process = self.start()
        self._wait_until_committed(self.site.num_committed() + 1, process)
        self.kill_a_worker(process)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors

    def kill_a_worker(self, process: subprocess.Popen[str]) -> None:
        self._sleep(0.2)
        pids: list[int] = []

        def some_live() -> bool:
            pids[:] = [pid for pid in workers_of(process.pid) if pid not in self.killed]
            return bool(pids)

        wait_until(lambda: some_live() or process.poll() is not None)
        assert pids, "the run ended before its workers could be killed"
        pid = self.generator.choice(pids)
        os.kill(pid, signal.SIGKILL)
        self.killed.add(pid)

    def _has_come(self, phase: str, pid: int) -> bool:
        if phase == "ray_starts":
            return any(self.temporary.glob(f"ltx-ray-*-{pid}-*"))
        return phase == "imports" or bool(workers_of(pid))

    def _wait_until_committed(self, num: int, process: subprocess.Popen[str]) -> None:
        deadline_s = time.monotonic() + 100
        while self.site.num_committed() < num and process.poll() is None:
            assert time.monotonic() < deadline_s, "no progress"
            time.sleep(0.05)  # looking into a bucket costs its server time

    def _sleep(self, at_most_s: float) -> None:
        time.sleep(self.generator.uniform(0, at_most_s))


def workers_of(pid: int) -> list[int]:
    return sorted(filter(is_worker, below(pid)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("on", "phases"),
    [("bucket", SHORT), *(pytest.param(on, LONG, marks=pytest.mark.long) for on in ("disk", "bucket"))],
    ids=["short-bucket", "long-disk", "long-bucket"],
)  # fmt: skip
def test_killed_drivers_and_workers_lose_repeat_and_leave_nothing(
    site: Callable[..., Site], temporary: Path, tmp_path: Path, on: str, phases: list[str]
) -> None:
    print(f"CHAOS_SEED={SEED}")  # noqa: T201 - shown when it fails
    generator = random.Random(f"{SEED} {on}")
    chaos = Chaos(site(on, NUM_ROWS), generator, temporary)
    for phase in generator.sample(phases, len(phases)):
        started_s, said = time.monotonic(), chaos.kill_a_driver(phase)
        print(f"{phase}: {time.monotonic() - started_s:.1f} s, {chaos.site.num_committed()} committed\n{said}")  # noqa: T201
    chaos.goes_on_without_a_worker()
    assert len(chaos.killed) == 1 + sum(WORKERS_KILLED.get(phase, 0) for phase in phases)
    check_nothing_lives_in(temporary)
    assert not list(temporary.glob("ltx-*"))
    check_output(chaos.site.output(tmp_path / "copy"), [f"clip-{i}" for i in range(NUM_ROWS)])
    if on == "bucket":
        assert fsspec.filesystem("s3").list_multipart_uploads(chaos.site.root.split("/")[2]) == []
        # The lock that fetches of one machine wait for stays: to remove it would let two of them in.
        assert {path.name for path in (tmp_path / "cache").rglob(".*")} <= {".fetch.lock"}
