"""The same job with manifest, model, output and report in a bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import pytest

from tests.end_to_end.checker import check_output, check_report_opens, results_of, runs_of
from tests.end_to_end.conftest import ROOT, Site, run_command


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
    check_report_opens(runs_of(copy)[0], 6)

    again = run_command("render", *arguments)
    assert again.returncode == 0
    assert {row["status"] for row in results_of(runs_of(there.output(tmp_path / "copy2"))[-1])} == {"skipped"}
    report = run_command("report", f"run={bucket}/out/runs/{runs_of(copy)[0].name}")
    assert report.returncode == 0 and "6 rendered" in report.stdout


def replaced(arguments: Sequence[str], **settings: str) -> list[str]:
    """`arguments` with other values for some settings; `model_folder` stands for model.folder."""
    other = {name.replace("_", "."): value for name, value in settings.items()}
    return [argument for argument in arguments if argument.partition("=")[0] not in other] + [
        f"{name}={value}" for name, value in other.items()
    ]


def test_a_bucket_without_the_model_is_refused_and_nothing_is_built(arguments: tuple[str, ...], bucket: str) -> None:
    there = f"{bucket}/models/empty"
    done = run_command("render", *replaced(arguments, model_folder=there))
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: model nano must be staged, got no {there}/fingerprint.nano.json; run: python -m jobs.stage_weights "
        f"model=nano model.folder={there}\n"
    )
    assert not (ROOT / "s3:").exists()
    assert fsspec.filesystem("s3").find(f"{bucket}/out") == []


def test_a_model_staged_straight_into_a_bucket_is_the_one_of_a_disk(
    arguments: tuple[str, ...], bucket: str, model_folder: Path
) -> None:
    there = f"{bucket}/models/staged"
    done = run_command("stage_weights", f"model.folder={there}")
    assert done.returncode == 0, done.stderr
    fs = fsspec.filesystem("s3")
    assert fs.cat(f"{there}/fingerprint.nano.json") == (model_folder / "fingerprint.nano.json").read_bytes()
    assert run_command("render", *replaced(arguments, model_folder=there), "limit=1").returncode == 0

    assert not (ROOT / "s3:").exists()


def test_a_bucket_that_is_not_there_is_refused_in_one_line(arguments: tuple[str, ...], s3_endpoint: str) -> None:
    absent = "s3://no-such-bucket-anywhere/out"
    done = run_command("render", *replaced(arguments, output=absent))
    assert done.returncode == 2, done.stderr
    assert "bucket must exist" in done.stderr and "Traceback" not in done.stderr
