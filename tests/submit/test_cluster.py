"""Renders submitted to a real Ray head, token authentication on, otherwise default settings: the exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.submit.conftest import ROOT, Head, small_rows, write_manifest


def _started(head: Head, tmp_path: Path, job_id: str) -> subprocess.Popen[str]:
    """A submitted render of many clips that has begun to render."""
    manifest = write_manifest(tmp_path / "many.parquet", small_rows(400))
    command = head.command(tmp_path / "out", f"manifest={manifest}", f"submission_id={job_id}")
    process = subprocess.Popen(command, cwd=ROOT, env=head.environ, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    end = time.monotonic() + 60
    while not list((tmp_path / "out" / "commits").glob("*.json")):
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)
        time.sleep(0.2)
    return process


def test_a_render_succeeds_with_its_log_on_stdout_and_only_named_variables(head: Head, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "a 'b' $HOME=c.parquet", small_rows(1))
    done = head.submit(tmp_path / "out", f"manifest={manifest}", "env=[FARM_TEST]", FARM_TEST="a b=c", OTHER="secret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running entrypoint" in done.stdout and "rendered" in done.stdout
    assert done.stdout.count("Running entrypoint") == 1
    assert "submitted job render-" in done.stderr
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 1
    job_id = done.stderr.split("submitted job ")[1].split()[0]
    info = head.request("GET", f"/api/jobs/{job_id}").decode()
    assert '"FARM_TEST": "a b=c"' in info and "secret" not in info


def test_rows_that_are_rejected_give_3_and_a_missing_manifest_2(head: Head, tmp_path: Path) -> None:
    rows = [*small_rows(1), {**small_rows(2)[1], "num_frames": 10}]
    done = head.submit(tmp_path / "out", f"manifest={write_manifest(tmp_path / 'm.parquet', rows)}")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "num_frames must be 8k+1" in done.stdout

    done = head.submit(tmp_path / "out", f"manifest={tmp_path / 'nowhere.parquet'}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "manifest must exist" in done.stdout


def test_a_job_stopped_from_outside_gives_5(head: Head, tmp_path: Path) -> None:
    process = _started(head, tmp_path, "stopped-outside")
    head.request("POST", "/api/jobs/stopped-outside/stop")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 5, output
    assert "job stopped-outside was stopped; the same command goes on from here" in output


def test_ctrl_c_stops_the_job_and_gives_5(head: Head, tmp_path: Path) -> None:
    job_id = "stopped-by-ctrl-c"
    process = _started(head, tmp_path, job_id)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 5, output
    assert '"status": "STOPPED"' in head.request("GET", f"/api/jobs/{job_id}").decode()
    committed = len(list((tmp_path / "out" / "commits").glob("*.json")))
    time.sleep(1)
    assert len(list((tmp_path / "out" / "commits").glob("*.json"))) == committed < 400


def test_without_waiting_only_the_id_is_printed(head: Head, tmp_path: Path) -> None:
    arguments = ("wait=false", "submission_id=left-alone", "dry_run=true")
    # Ray itself would prefer this address to the one that was given.
    done = head.submit(tmp_path / "out", *arguments, RAY_ADDRESS="http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (0, "left-alone\n"), done.stderr
    done = head.submit(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert "submission_id must be new to the cluster, got 'left-alone'" in done.stderr


@pytest.mark.parametrize("environ", [{"RAY_AUTH_TOKEN": "w" * 64}, {"RAY_AUTH_MODE": "disabled"}, {"HOME": "/nowhere"}])
def test_a_wrong_or_missing_token_is_2_and_says_what_to_set(
    head: Head, tmp_path: Path, environ: dict[str, Any]
) -> None:
    done = head.submit(tmp_path / "out", **environ)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "needs a valid token" in done.stderr and "RAY_AUTH_TOKEN" in done.stderr


def test_rays_own_command_works_and_is_kept_from_losing_its_output(head: Head, tmp_path: Path) -> None:
    environ = {**head.environ, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": head.address}
    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", ".", "--"]
    render = [*ray, "python", "-m", "jobs.render", "dry_run=true", f"model.folder={head.model_folder}"]
    kept, lost = (
        subprocess.Popen([*render, f"output={output}"], cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for output in (tmp_path / "out", "outputs/x")
    )  # fmt: skip
    text, _ = kept.communicate(timeout=60)
    assert kept.returncode == 0, text
    assert "TFLOP" in text
    text, _ = lost.communicate(timeout=60)
    assert lost.returncode == 1, "Ray's own command knows no other code"
    assert "output must be a URL or an absolute path in a submitted Ray job, got 'outputs/x'" in text
    assert os.path.lexists(ROOT / "outputs" / "x") is False


@pytest.fixture
def second_node(head: Head, tmp_path: Path) -> Iterator[None]:
    arguments = ["start", f"--address={head.gcs_address}", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
    with (tmp_path / "node.log").open("w") as log:
        # Ray's head uses a token that it finds; a node that joins does so only when told.
        process = subprocess.Popen([str(Path(sys.executable).parent / "ray"), *arguments], stdout=log, stderr=log,
                                   env={**head.environ, "RAY_AUTH_MODE": "token"}, start_new_session=True)  # fmt: skip
    try:
        end = time.monotonic() + 40
        while head.request("GET", "/api/v0/nodes").count(b'"ALIVE"') < 2:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "node.log").read_text()
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.usefixtures("second_node")
def test_a_plain_output_path_on_two_nodes_is_2_unless_it_is_shared(head: Head, tmp_path: Path) -> None:
    done = head.submit(tmp_path / "out", "dry_run=true", "wait=false")
    assert done.returncode == 2
    assert "on a cluster of 2 nodes" in done.stderr and "cluster.shared_output=true" in done.stderr
    done = head.submit(tmp_path / "out", "dry_run=true", "wait=false", "cluster.shared_output=true")
    assert done.returncode == 0, done.stderr
