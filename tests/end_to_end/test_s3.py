"""The same job with manifest, model, output and report in a bucket."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.end_to_end.checker import check_output, results_of, runs_of
from tests.end_to_end.conftest import ROOT, Site, command, run_command

NUM_KILLS = 4


@pytest.fixture
def there(site: Callable[..., Site]) -> Site:
    return site("bucket", 6)


@pytest.fixture
def arguments(there: Site) -> tuple[str, ...]:
    return there.arguments


def test_everything_in_a_bucket_can_be_fetched_and_read_and_is_done_once(
    arguments: tuple[str, ...], bucket: str, there: Site, tmp_path: Path
) -> None:
    assert run_command("estimate", *arguments).returncode == 0
    done = run_command("render", *arguments)
    assert done.returncode == 0, done.stderr
    copy = there.output(tmp_path / "copy")
    check_output(copy, [f"clip-{i}" for i in range(6)])
    assert all(row["uri"].startswith(f"{bucket}/out/videos/clip-") for row in results_of(runs_of(copy)[0]))
    page = (runs_of(copy)[0] / "report.html").read_text()
    links = set(re.findall(r'"(\.\./\.\./videos/[^"]+)"', page))
    assert len(links) == 6 and all((runs_of(copy)[0] / link).is_file() for link in links)

    again = run_command("render", *arguments)
    assert again.returncode == 0
    assert {row["status"] for row in results_of(runs_of(there.output(tmp_path / "copy2"))[-1])} == {"skipped"}
    report = run_command("report", f"run={bucket}/out/runs/{runs_of(copy)[0].name}")
    assert report.returncode == 0 and "6 rendered" in report.stdout


def test_kills_at_random_moments_lose_and_repeat_nothing_in_a_bucket(
    arguments: tuple[str, ...], bucket: str, there: Site, tmp_path: Path
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
    check_output(there.output(tmp_path / "copy"), [f"clip-{i}" for i in range(6)])
    assert fsspec.filesystem("s3").list_multipart_uploads(bucket.removeprefix("s3://")) == []


def test_a_bucket_that_is_not_there_is_refused_in_one_line(arguments: tuple[str, ...], s3_endpoint: str) -> None:
    absent = "s3://no-such-bucket-anywhere/out"
    done = run_command("render", *[a if not a.startswith("output=") else f"output={absent}" for a in arguments])
    assert done.returncode == 2, done.stderr
    assert "bucket must exist" in done.stderr and "Traceback" not in done.stderr
