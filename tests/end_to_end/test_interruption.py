"""Signals and kills at any moment leave a run that the same command finishes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.checker import check_output, records_of, results_of, runs_of
from tests.end_to_end.conftest import ROOT, command, run_command, small_rows

EXIT_WITHIN_S = 2.5
NUM_KILLS = 10
SEED = int(os.environ.get("CHAOS_SEED", "20261120"))


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path, manifest: Callable[[list[dict[str, Any]]], Path]) -> list[str]:
    return [f"manifest={manifest(small_rows(12))}", f"output={tmp_path / 'out'}", f"model.folder={model_folder}"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command("render", *arguments), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.005)


def loading(output: Path) -> bool:
    return any(
        "workers" in path.read_text() and "acquired_ns" in path.read_text() for path in output.glob("runs/*/run.json")
    )


# When to send the signal: during the first imports, while torch is imported and the model loaded, while rendering.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "imports": lambda output: True,
    "loading": loading,
    "rendering": lambda output: (output / "commits").is_dir() and len(records_of(output)) >= 2,
}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_the_run_in_time_with_code_5_and_it_goes_on_afterwards(
    arguments: list[str], tmp_path: Path, moment: str, signum: signal.Signals
) -> None:
    output = tmp_path / "out"
    process = start(arguments)
    # The interpreter itself needs some milliseconds before any of our code can run.
    time.sleep(0.15)
    wait_until(lambda: MOMENTS[moment](output))
    sent_s = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    took_s = time.monotonic() - sent_s
    assert process.returncode == 5, errors
    assert took_s < EXIT_WITHIN_S
    assert "Traceback" not in errors and "interrupted" in errors
    if moment == "rendering":
        statuses = {row["status"] for row in results_of(runs_of(output)[0])}
        assert statuses == {"rendered", "not_started"}
        assert (runs_of(output)[0] / "report.html").is_file()
    done = run_command("render", *arguments)
    assert done.returncode == 0, done.stderr
    check_output(output, [f"clip-{i}" for i in range(12)])


def test_kills_at_random_moments_lose_and_repeat_nothing(arguments: list[str], tmp_path: Path) -> None:
    """Ten SIGKILLs, spread over the length of a run that is long enough to be hit everywhere."""
    generator = random.Random(SEED)
    output = tmp_path / "out"
    for kill in range(NUM_KILLS):
        process = start(arguments)
        # Imports and loading take a second or two; the rest of the time clips are rendered and committed.
        delay_s = generator.uniform(0.2, 4.5)
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), f"kill {kill} of seed {SEED}"
    done = run_command("render", *arguments)
    assert done.returncode == 0, done.stderr
    check_output(output, [f"clip-{i}" for i in range(12)])


def test_the_report_of_a_killed_run_says_what_is_known_and_following_it_ends(
    arguments: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert run_command("render", *arguments, "limit=2").returncode == 0
    process = start(arguments)
    wait_until(lambda: len(records_of(output)) >= 4)
    process.kill()
    process.communicate()
    killed = runs_of(output)[-1]
    done = run_command("report", f"run={killed}", "follow=true", timeout_s=30)
    assert done.returncode == 0, done.stderr
    assert "lost: 12 rows" in done.stdout and "skipped 2" in done.stdout
    assert "lost" in (killed / "report.html").read_text()
