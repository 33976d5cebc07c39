"""The same job on Ray: signals leave no process behind; wrong addresses are refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.ray_folder import SOCKETS_PREFIX
from tests.end_to_end.checker import records_of
from tests.end_to_end.conftest import ROOT, Render, command, small_rows
from tests.end_to_end.test_interruption import EXIT_WITHIN_S, wait_until

pytestmark = pytest.mark.ray

ON_RAY = ("cluster=local", "cluster.num_workers=2")


def below(root: int) -> set[int]:
    """The processes under `root`."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def is_alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}") / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_nothing_is_left(driver_pid: int, pids: set[int], *, within_s: float) -> None:
    """Neither a process that was below the driver, nor one that names its Ray's folder or has a file open in it."""
    wait_until(lambda: not any(is_alive(pid) for pid in pids), within_s)
    name = re.compile(rf"{SOCKETS_PREFIX}\w+-{driver_pid}-")
    wait_until(lambda: not folders_of(driver_pid), within_s)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            files = [str(file.readlink()) for file in (folder / "fd").iterdir()]
            files.append((folder / "cmdline").read_text(errors="replace"))
        except OSError:
            continue
        assert not any(name.search(file) for file in files), f"process {folder.name} is left"


def folders_of(driver_pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{SOCKETS_PREFIX}*-{driver_pid}-*"))


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path, manifest: Callable[[list[dict[str, Any]]], Path]) -> list[str]:
    # More than the workers may hold at once: what they hold when a signal comes, they may finish.
    rows = manifest(small_rows(40))
    return [f"manifest={rows}", f"output={tmp_path / 'out'}", f"model.folder={model_folder}", *ON_RAY]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command("render", *arguments), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment)  # fmt: skip


MOMENTS: dict[str, Callable[[int, Path], bool]] = {
    "ray_starts": lambda pid, output: bool(below(pid)),
    "actors_start": lambda pid, output: "acquired_ns" in "".join(p.read_text() for p in output.glob("runs/*/run.json")),
    "rendering": lambda pid, output: (output / "commits").is_dir() and len(records_of(output)) >= 1,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_a_run_on_ray_in_time_and_leaves_no_process(
    arguments: list[str], tmp_path: Path, moment: str
) -> None:
    process = start(arguments)
    wait_until(lambda: MOMENTS[moment](process.pid, tmp_path / "out"))
    pids, sent_s = below(process.pid), time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 5, errors
    assert time.monotonic() - sent_s < EXIT_WITHIN_S
    assert "Traceback" not in errors and "*** SIGTERM" not in errors and "interrupted" in errors
    check_nothing_is_left(process.pid, pids, within_s=1)


def is_worker(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}") / "cmdline").read_bytes().startswith(b"ray::WorkerProcess")
    except OSError:
        return False


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("nonsense", "that is not host:port"),
        ("ray://127.0.0.1:10001", "submit the job there"),
    ],
)
def test_a_wrong_address_is_one_clear_line_in_bounded_time(
    render: Render, manifest: Callable[[list[dict[str, Any]]], Path], monkeypatch: pytest.MonkeyPatch, address: str,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", address)
    started_s = time.monotonic()
    done = render(manifest(small_rows(1)), *ON_RAY)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - started_s < 15
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: RAY_ADDRESS must be the host:port of a running Ray cluster, got {address!r}")
    assert says in line and "Traceback" not in done.stderr
