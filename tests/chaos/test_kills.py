"""Kills at random moments of a run on a Ray cluster of several nodes: of ranks, drivers, whole nodes; stopped ranks;
drivers asked to end. The long form: 1,000 faults over 10,000 rows.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import pytest

from tests.chaos.conftest import CLIP, SEED, FarmSite, StartedDriver, keep, plain_rows
from tests.chaos.ray_nodes import Nodes, ray_nodes
from tests.end_to_end.checker import check_output, decoded_frames, events_of, runs_of

# How often each kind of fault comes.
KINDS = {"kill a rank": 86, "kill the driver": 6, "kill a node": 3, "stop a rank": 3, "ask the driver to end": 2}
HANG_AFTER_S = 2.0
# What `ray job stop` gives.
END_WITHIN_S = 3.0


@dataclass
class Storm:
    """Keeps a driver running on `site` and does it harm, once for every few rows that were committed."""

    site: FarmSite
    nodes: Nodes
    generator: random.Random
    kinds: dict[str, int]
    arguments: tuple[str, ...]
    done: Counter[str] = field(default_factory=Counter)
    # When a rank was killed or stopped, in UTC nanoseconds.
    rank_killed_ns: list[int] = field(default_factory=list)
    rank_stopped_ns: list[int] = field(default_factory=list)
    driver: StartedDriver | None = None

    def start(self) -> None:
        self.driver = self.site.start(
            "cluster=local", "cluster.shared_output=true", f"cluster.hang_after_s={HANG_AFTER_S}", *self.arguments
        )

    def rage(self, num_faults: int, rows_a_fault: float) -> None:
        while self.done.total() < num_faults:
            if not self._wait_for_commits(int((self.done.total() + 1) * rows_a_fault)):
                return
            time.sleep(self.generator.uniform(0, 0.2))
            kind = self.generator.choices(list(self.kinds), list(self.kinds.values()))[0]
            if getattr(self, "_" + kind.replace(" ", "_"))():
                self.done[kind] += 1

    def finish(self) -> int:
        """Let the driver end; rows that random kills hit too often are tried again by another. Returns how many."""
        for num_runs in range(1, 6):
            assert self.driver is not None
            errors = self.driver.said(300)
            if self.driver.returncode == 0:
                return num_runs
            assert self.driver.returncode in (3, 6), errors
            self.start()
        raise AssertionError("rows are left")

    def _wait_for_commits(self, num: int) -> bool:
        """False if the manifest is done. A driver that ended, as one whose node died may, is followed by another."""
        folder, deadline_s = Path(self.site.root) / "commits", time.monotonic() + 120
        while time.monotonic() < deadline_s:
            committed = len(os.listdir(folder)) if folder.exists() else 0  # noqa: PTH208 - ten times a second, 10,000 names
            if committed >= min(num, len(self.site.ids) - 20):
                return committed < len(self.site.ids) - 20
            assert self.driver is not None
            if self.driver.poll() is not None:
                assert self.driver.returncode in (0, 3, 6), self.driver.said()
                self.start()
            time.sleep(0.05)
        raise AssertionError(f"no progress: {self.done}")

    def _signal_a_rank(self, signum: int, noted: list[int]) -> bool:
        ranks = self.nodes.ranks()
        if not ranks:
            return False
        noted.append(time.time_ns())
        with suppress(ProcessLookupError):
            os.kill(self.generator.choice(ranks), signum)
        return True

    def _kill_a_rank(self) -> bool:
        return self._signal_a_rank(signal.SIGKILL, self.rank_killed_ns)

    def _stop_a_rank(self) -> bool:
        return self._signal_a_rank(signal.SIGSTOP, self.rank_stopped_ns)

    def _kill_the_driver(self) -> bool:
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()
        self.start()
        return True

    def _kill_a_node(self) -> bool:
        _head, *others = self.nodes.cluster.list_all_nodes()
        self.nodes.kill(self.generator.choice(others))
        self.nodes.add()
        return True

    def _ask_the_driver_to_end(self) -> bool:
        assert self.driver is not None
        since_s = time.monotonic()
        self.driver.terminate()
        errors = self.driver.said(30)
        assert self.driver.returncode in (5, 0), errors
        assert time.monotonic() - since_s < END_WITHIN_S + 1.0, "the machine may be busy, but not so long"
        self.start()
        return True


class Reader:
    """Somebody who looks at the newest clip all the time: whatever has a name in `videos` plays to its end."""

    def __init__(self, root: Path) -> None:
        self._videos = root / "videos"
        self._over = threading.Event()
        self.num_read = 0
        self.torn: list[str] = []
        self.lived_to_the_end = False
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.lived_to_the_end = self._thread.is_alive()
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._over.wait(0.3):
            # Another writer's clip may be the one that stands: what vanishes meanwhile is not torn.
            with suppress(FileNotFoundError):
                for path in sorted(self._videos.glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)[-1:]:
                    self._read_one(path)

    def _read_one(self, path: Path) -> None:
        try:
            whole = decoded_frames(path) == CLIP["num_frames"]
        except FileNotFoundError:
            raise
        except av.FFmpegError:
            whole = False
        self.num_read += 1
        if not whole:
            self.torn.append(path.name)


def delays_s(since_ns: list[int], events: list[dict[str, Any]], name: str, within_s: float) -> list[float]:
    """For each moment, seconds to the first event of `name` after it that no earlier moment was followed by."""
    times = sorted(event["at_ns"] for event in events if event["event"] == name)
    found = []
    for at_ns in sorted(since_ns):
        while times and times[0] < at_ns:
            times.pop(0)
        if times and times[0] - at_ns < within_s * 1e9:
            found.append((times.pop(0) - at_ns) / 1e9)
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"num": len(values), "median_s": round(statistics.median(values), 3), "max_s": round(max(values), 3)}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num_faults", "num_rows"), [(6, 260), pytest.param(1000, 10_000, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_kills_of_ranks_drivers_and_nodes_lose_double_and_tear_nothing(
    farm_site: Callable[..., FarmSite], num_faults: int, num_rows: int
) -> None:
    site, started_s = farm_site("disk", plain_rows(num_rows)), time.monotonic()
    with ray_nodes(2, 1) as nodes:
        site.environment["RAY_ADDRESS"] = nodes.address
        storm = Storm(site, nodes, random.Random(SEED), KINDS, ("cluster.num_workers=2", "--step_s=0.002"))
        storm.start()
        with Reader(Path(site.root)) as reader:
            storm.rage(num_faults, 0.95 * (num_rows - 20) / num_faults)
            num_runs = storm.finish()
    assert reader.lived_to_the_end and reader.num_read and not reader.torn
    output = Path(site.root)
    check_output(output, site.ids)
    events = sorted((e for run in runs_of(output) for e in events_of(run)), key=lambda e: e["at_ns"])
    detected = delays_s(storm.rank_killed_ns, events, "worker_lost", 5.0)
    assert len(detected) >= 0.8 * len(storm.rank_killed_ns), "the others died with their driver or node"
    assert storm.done.total() >= 0.95 * num_faults, storm.done
    keep(
        "kills",
        faults=dict(storm.done),
        total=storm.done.total(),
        rows=num_rows,
        violations=0,
        runs=len(runs_of(output)),
        runs_after_the_last_fault=num_runs,
        clips_read_meanwhile=reader.num_read,
        rank_lost_noticed=summary(detected),
        worker_ready_again=summary(delays_s(storm.rank_killed_ns, events, "worker_ready", 30.0)),
        seconds=round(time.monotonic() - started_s, 1),
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num_kills", "num_stops", "num_rows"), [(1, 1, 44), pytest.param(100, 50, 1200, marks=pytest.mark.long)],
    ids=["short", "long"],
)  # fmt: skip
def test_a_gang_that_loses_a_rank_in_a_collective_starts_again_as_a_whole(
    farm_site: Callable[..., FarmSite], num_kills: int, num_stops: int, num_rows: int
) -> None:
    """Gangs of two over gloo: one rank is killed, or stopped so that it answers nobody."""
    site, started_s = farm_site("disk", plain_rows(num_rows)), time.monotonic()
    generator, total = random.Random(SEED), num_kills + num_stops
    with ray_nodes(1, 2) as nodes:
        site.environment["RAY_ADDRESS"] = nodes.address
        storm = Storm(site, nodes, generator, {}, ("cluster.num_workers=1", "--ranks=2", "--step_s=0.01"))
        storm.start()
        plan = ["kill a rank"] * num_kills + ["stop a rank"] * num_stops
        for number, kind in enumerate(generator.sample(plan, total), start=1):
            storm.kinds = {kind: 1}
            storm.rage(number, 0.9 * (num_rows - 20) / total)
        num_runs = storm.finish()
    output = Path(site.root)
    check_output(output, site.ids)
    events = sorted((e for run in runs_of(output) for e in events_of(run)), key=lambda e: e["at_ns"])
    killed = delays_s(storm.rank_killed_ns, events, "worker_lost", 5.0)
    stopped = delays_s(storm.rank_stopped_ns, events, "worker_lost", HANG_AFTER_S + 5.0)
    assert len(killed) == len(storm.rank_killed_ns) and len(stopped) == len(storm.rank_stopped_ns)
    assert storm.done.total() == total
    torn_down = [event["processes_gone_s"] for event in events if event["event"] == "worker_torn_down"]
    keep(
        "gangs",
        faults=dict(storm.done),
        total=storm.done.total(),
        rows=num_rows,
        violations=0,
        runs_after_the_last_fault=num_runs,
        kill_noticed=summary(killed),
        stop_noticed=summary(stopped),
        all_ranks_gone=summary(torn_down),
        worker_ready_again=summary(delays_s(storm.rank_killed_ns, events, "worker_ready", 60.0)),
        seconds=round(time.monotonic() - started_s, 1),
    )
