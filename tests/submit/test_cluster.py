"""Renders submitted to a real Ray head, token authentication on, otherwise default settings: the exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs

from tests.end_to_end.checker import check_output, check_report_opens, download, results_of, runs_of
from tests.submit.conftest import AWS, ROOT, Head, InBucket, small_rows, write_manifest


def _started(command: list[str], environ: dict[str, str], commits: str) -> subprocess.Popen[str]:
    """A submitted render that has begun to render."""
    process = subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    end = time.monotonic() + 60
    while not _num_commits(commits):
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)
        time.sleep(0.2)
    return process


def _num_commits(commits: str) -> int:
    fs, path = url_to_fs(commits, use_listings_cache=False)
    return len(fs.glob(f"{path}/*.json"))


def test_a_render_in_a_bucket_gives_0_its_log_and_a_report_that_opens(in_bucket: InBucket, tmp_path: Path) -> None:
    name = "a 'b' $HOME=c.parquet"
    named = f"env=[FARM_TEST,{','.join(AWS)}]"
    done = in_bucket.submit(in_bucket.manifest(small_rows(2), name), named, FARM_TEST="a b=c", OTHER="secret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rendered" in done.stdout
    assert done.stdout.count("Running entrypoint") == 1
    assert "submitted job render-" in done.stderr
    copy = download(in_bucket.bucket, tmp_path / "copy")
    check_output(copy, ["clip-0", "clip-1"])
    check_report_opens(runs_of(copy)[0], 2)
    job_id = done.stderr.split("submitted job ")[1].split()[0]
    info = in_bucket.head.request("GET", f"/api/jobs/{job_id}").decode()
    assert '"FARM_TEST": "a b=c"' in info and "secret" not in info


def test_rows_that_are_rejected_give_3(in_bucket: InBucket, tmp_path: Path) -> None:
    rows = [*small_rows(1), {**small_rows(2)[1], "num_frames": 10}]
    done = in_bucket.submit(in_bucket.manifest(rows))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "num_frames must be 8k+1" in done.stdout
    (run,) = runs_of(download(in_bucket.bucket, tmp_path / "copy"))
    assert [row["status"] for row in results_of(run)] == ["rendered", "rejected"]
    check_report_opens(run, 1)


def test_what_a_job_finds_wrong_in_a_bucket_is_2_and_one_line(in_bucket: InBucket) -> None:
    """A manifest that is not there, a bucket that is not there, and credentials that nobody handed over."""
    manifest, absent = in_bucket.manifest(small_rows(1)), "s3://no-such-bucket-anywhere/out"
    nowhere, nobody = f"{in_bucket.bucket}/nowhere.parquet", "env=[AWS_ENDPOINT_URL,AWS_EC2_METADATA_DISABLED]"
    says = {
        in_bucket.settings(f"manifest={nowhere}"): f"manifest must exist, got '{nowhere}'",
        (absent, *in_bucket.settings(manifest)[1:]): f"bucket must exist, got {absent}",
        in_bucket.settings(manifest, nobody): "check the path and the credentials",
    }
    environ = {**in_bucket.head.environ, **in_bucket.environ, "AWS_EC2_METADATA_DISABLED": "true"}
    submitted = {
        settings: subprocess.Popen(in_bucket.head.command(*settings), cwd=ROOT, env=environ, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for settings in says
    }  # fmt: skip
    for settings, process in submitted.items():
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2, output + errors
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert says[settings] in line and "Traceback" not in output


def test_a_job_stopped_from_outside_gives_5(in_bucket: InBucket) -> None:
    manifest = in_bucket.manifest(small_rows(400))
    command = in_bucket.head.command(*in_bucket.settings(manifest, "submission_id=stopped-outside"))
    process = _started(command, {**in_bucket.head.environ, **in_bucket.environ}, f"{in_bucket.bucket}/out/commits")
    in_bucket.head.request("POST", "/api/jobs/stopped-outside/stop")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 5, output
    assert "job stopped-outside was stopped; the same command goes on from here" in output


def test_ctrl_c_stops_the_job_and_gives_5(head: Head, tmp_path: Path) -> None:
    job_id = "stopped-by-ctrl-c"
    manifest = write_manifest(tmp_path / "many.parquet", small_rows(400))
    command = head.command(tmp_path / "out", f"manifest={manifest}", f"submission_id={job_id}")
    process = _started(command, head.environ, commits := str(tmp_path / "out" / "commits"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 5, output
    assert '"status": "STOPPED"' in head.request("GET", f"/api/jobs/{job_id}").decode()
    committed = _num_commits(commits)
    time.sleep(1)
    assert _num_commits(commits) == committed < 400


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


def test_a_driver_outside_that_has_no_token_is_2_and_says_what_to_set(head: Head, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", small_rows(1))
    settings = [f"manifest={manifest}", f"output={tmp_path / 'out'}", f"model.folder={head.model_folder}"]
    environ = {**head.environ, "RAY_ADDRESS": head.gcs_address, "RAY_NUM_REDIS_GET_RETRIES": "2"}
    done = subprocess.run([sys.executable, "-m", "jobs.render", *settings, "cluster=local"], cwd=ROOT, env=environ,
                          text=True, capture_output=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "RAY_ADDRESS must be" in line and "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in line


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


def test_a_cluster_without_free_resources_is_6_in_time_and_says_what_there_is(head: Head, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", small_rows(1))
    workers = ("cluster=local", "cluster.num_workers=1", "cluster.start_timeout_s=2")
    with head.taken():
        done = head.submit(tmp_path / "out", f"manifest={manifest}", *workers)
    assert done.returncode == 6, done.stdout + done.stderr
    assert "1 of 1 workers found no place within 2 s; each asks for 1 CPU" in done.stdout
    assert "2 CPU (0 free)" in done.stdout and "Traceback" not in done.stdout
