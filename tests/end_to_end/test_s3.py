"""The same job with manifest, model, output and report in a bucket."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.end_to_end.checker import check_output, results_of, runs_of
from tests.end_to_end.conftest import ROOT, Render, command, run_command, small_rows

Manifest = Callable[[list[dict[str, Any]]], Path]
NUM_KILLS = 4


def download(bucket: str, target: Path) -> Path:
    """The bucket's output as a user would fetch it."""
    fsspec.filesystem("s3", use_listings_cache=False).get(f"{bucket}/out/", f"{target}/", recursive=True)
    return target


@pytest.fixture
def arguments(bucket: str, model_folder: Path, manifest: Manifest, tmp_path: Path) -> list[str]:
    fs = fsspec.filesystem("s3")
    fs.put(str(manifest(small_rows(6))), f"{bucket}/prompts/date=2026-11-20/a.parquet")
    fs.put(f"{model_folder}/", f"{bucket}/models/nano/", recursive=True)
    return [f"manifest={bucket}/prompts", f"output={bucket}/out", f"model.folder={bucket}/models/nano",
            f"model.cache={tmp_path / 'cache'}"]  # fmt: skip


def test_everything_in_a_bucket_gives_the_bytes_of_a_local_run(
    arguments: list[str], bucket: str, render: Render, manifest: Manifest, tmp_path: Path
) -> None:
    assert run_command("estimate", *arguments).returncode == 0
    done = run_command("render", *arguments)
    assert done.returncode == 0, done.stderr
    copy = download(bucket, tmp_path / "copy")
    check_output(copy, [f"clip-{i}" for i in range(6)])
    assert render(manifest(small_rows(6))).returncode == 0
    remote, local = results_of(runs_of(copy)[0]), results_of(runs_of(tmp_path / "out")[0])
    assert [row["sha256"] for row in remote] == [row["sha256"] for row in local]
    assert all(row["uri"].startswith(f"{bucket}/out/videos/clip-") for row in remote)
    page = (runs_of(copy)[0] / "report.html").read_text()
    links = set(re.findall(r'"(\.\./\.\./videos/[^"]+)"', page))
    assert len(links) == 6 and all((runs_of(copy)[0] / link).is_file() for link in links)

    again = run_command("render", *arguments)
    assert again.returncode == 0
    assert {row["status"] for row in results_of(runs_of(download(bucket, tmp_path / "copy2"))[-1])} == {"skipped"}
    report = run_command("report", f"run={bucket}/out/runs/{runs_of(copy)[0].name}")
    assert report.returncode == 0 and "6 rendered" in report.stdout


def test_kills_at_random_moments_lose_and_repeat_nothing_in_a_bucket(
    arguments: list[str], bucket: str, tmp_path: Path
) -> None:
    generator = random.Random(20261120)
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command("render", *arguments), cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(2.0, 6.0))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
    done = run_command("render", *arguments)
    assert done.returncode == 0, done.stderr
    check_output(download(bucket, tmp_path / "copy"), [f"clip-{i}" for i in range(6)])
    assert fsspec.filesystem("s3").list_multipart_uploads(bucket.removeprefix("s3://")) == []


def test_a_bucket_that_is_not_there_is_refused_in_one_line(arguments: list[str], s3_endpoint: str) -> None:
    absent = "s3://no-such-bucket-anywhere/out"
    done = run_command("render", *[a if not a.startswith("output=") else f"output={absent}" for a in arguments])
    assert done.returncode == 2, done.stderr
    assert "bucket must exist" in done.stderr and "Traceback" not in done.stderr
