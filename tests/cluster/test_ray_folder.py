"""What a killed driver leaves of its Ray is cleared up, by its reaper or by the next driver, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cluster.ray_folder import SOCKETS_PREFIX, new_folder, processes_in
from pipeline.storage.processes import writer

Process = subprocess.Popen[bytes]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Callable[[Path, str], Process]]:
    """Start a process that has a file of the folder open."""
    started: list[Process] = []

    def start(folder: Path, mode: str) -> Process:
        (folder / "log").touch()
        with (folder / "log").open(mode) as log:
            started.append(subprocess.Popen(["sleep", "60"], stdin=log if mode == "r" else None,
                                            stdout=log if mode == "a" else None))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def folder_of(where: str, pid: int, start: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"{SOCKETS_PREFIX}{where}-{pid}-{start}"
    folder.mkdir()
    return folder


def test_the_next_driver_ends_what_writes_to_a_dead_ones_folder_and_removes_it(
    sleeper: Callable[[Path, str], Process],
) -> None:
    where, pid, start = writer().split("-")
    dead, foreign = folder_of(where[:4], int(pid), "1"), folder_of("0000", 1, "1")
    agent, reader, stranger = sleeper(dead, "a"), sleeper(dead, "r"), sleeper(foreign, "a")
    assert processes_in(dead) == [agent.pid]
    mine = new_folder()
    assert agent.wait(1) == -9
    assert reader.poll() is None and stranger.poll() is None
    assert (dead.exists(), foreign.exists(), mine.is_dir()) == (False, True, True)
    assert mine.name == f"{SOCKETS_PREFIX}{where[:4]}-{pid}-{start}"


DRIVER = """
import subprocess, sys, tempfile, time
from pathlib import Path
from pipeline.cluster.ray_folder import new_folder, start_reaper
tempfile.tempdir = sys.argv[1]
folder = new_folder()
reaper = start_reaper(folder)
agent = subprocess.Popen(["sleep", "60"], stdout=(folder / "log").open("w"), start_new_session=True)
print(reaper.pid, agent.pid, flush=True)
time.sleep(60)
"""


def test_the_reaper_of_a_killed_driver_ends_what_is_left_and_itself(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    left = [Path(f"/proc/{pid}/exe") for pid in driver.stdout.readline().split()]
    assert len(left) == 2 and len(list(tmp_path.iterdir())) == 1
    driver.kill()
    driver.wait()
    deadline_s = time.monotonic() + 2
    while any(map(runs, left)) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not any(map(runs, left)) and not list(tmp_path.iterdir())


def runs(exe: Path) -> bool:
    try:
        return bool(exe.readlink())
    except OSError:
        return False
