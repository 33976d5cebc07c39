"""The processes of an ended worker are seen to be gone, and its GPU memory free, whatever state they were in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster import node_agent
from pipeline.cluster.gpu_memory import GpuUse, memory_in_use
from pipeline.cluster.node_agent import NodeAgent, Process, end_processes
from pipeline.storage.processes import start_ticks

MIB = 2**20


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[str]]:
    """A leader of a process group, as Ray's workers are, with a child."""
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    process.kill()
    process.wait()


def child_of(worker: subprocess.Popen[str]) -> int:
    assert worker.stdout is not None
    return int(worker.stdout.readline())


def test_a_stopped_process_is_ended_with_its_children(worker: subprocess.Popen[str]) -> None:
    child = child_of(worker)
    os.kill(worker.pid, signal.SIGSTOP)
    cleared = NodeAgent().clear((Process(worker.pid, start_ticks(worker.pid)),), ())
    assert not cleared.alive and cleared.processes_gone_s < 2 and cleared.memory_free_s is None
    assert start_ticks(worker.pid) is None and start_ticks(child) is None


def test_the_child_of_a_process_that_died_before_is_ended_too(worker: subprocess.Popen[str]) -> None:
    child, process = child_of(worker), Process(worker.pid, start_ticks(worker.pid))
    worker.kill()
    worker.wait()
    assert start_ticks(child) is not None
    assert end_processes((process,), 2.0) == ()
    assert start_ticks(child) is None


def test_a_later_process_of_the_same_number_is_left_alone(worker: subprocess.Popen[str]) -> None:
    child = child_of(worker)
    assert end_processes((Process(worker.pid, "1"),), 1.0) == ()
    assert worker.poll() is None and start_ticks(child) is not None


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi: one GPU with the MiB in use that the file says, held by process 4321."""
    used = tmp_path / "used"
    used.write_text("1000")
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *compute-apps*) echo "GPU-a, 4321";; *) echo "GPU-a, $(cat {used})";; esac\n'
    )  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return used


def test_memory_that_is_given_back_late_is_waited_for(gpu: Path) -> None:
    before = memory_in_use(("0",))
    assert before == (GpuUse("GPU-a", 1000 * MIB),)
    gpu.write_text("61000")
    giver = subprocess.Popen(["sh", "-c", f"sleep 0.7; echo 1100 > {gpu}"])
    cleared = NodeAgent().clear((), before)
    giver.wait()
    assert cleared.memory_free_s is not None and 0.5 < cleared.memory_free_s < 5 and not cleared.held


def test_memory_that_stays_held_names_the_gpu_the_bytes_and_the_holders(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory_in_use(("0",))
    gpu.write_text("61000")
    monkeypatch.setattr(node_agent, "FREE_S", 0.5)
    started_s = time.monotonic()
    (held,) = NodeAgent().clear((), before).held
    assert 0.5 < time.monotonic() - started_s < 3
    assert held.gpu == GpuUse("GPU-a", 60000 * MIB) and held.pids == (4321,)


def test_without_nvidia_smi_no_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert memory_in_use(("0",)) == ()
