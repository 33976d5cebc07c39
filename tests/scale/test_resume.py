"""A resume of a long manifest, half of it done, is planned in a minute and 2 GB, on a disk and in a slow bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.scale.night import Night, make_night

ROOT = Path(__file__).resolve().parent.parent.parent
REQUEST_S = 0.05
STORES = pytest.mark.parametrize("request_s", [0.0, REQUEST_S], ids=["disk", "bucket"])


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory) -> Night:
    return make_night(tmp_path_factory.mktemp("evening"), num_rows=20_000, num_newer=300)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    return make_night(tmp_path_factory.mktemp("night"), num_rows=1_000_000, num_newer=5_000)


def resumed(night: Night, request_s: float, timeout_s: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.scale.resume", str(request_s), *night.arguments], cwd=ROOT, text=True,
        capture_output=True, timeout=timeout_s, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{night.num_rows} rows, {request_s} s a request: {result['phases']}\n")
    return result


def check_plan(result: dict[str, Any], night: Night, *, within_s: float, within_mb: int) -> None:
    assert result["counts"] == {"done": night.num_done, "to_render": night.num_done, "rejected": 0}
    phases = result["phases"]
    assert sum(phases[name][0] for name in ("compose", "plan", "start")) < within_s, phases
    assert phases["start"][1] < within_mb, phases


def check_results(result: dict[str, Any], night: Night) -> None:
    """Every row once, in the order of the manifest, with what its record says; and a page that a browser can open."""
    run = night.output / "runs" / result["run_id"]
    names = ("row_index", "status", "id", "prompt", "sha256", "content_key", "x_take")
    table = pq.read_table(run / "results", columns=list(names))
    columns = {name: table[name].to_pylist() for name in names}
    assert columns["row_index"] == columns["x_take"] == list(range(night.num_rows))
    assert columns["status"] == ["skipped", "not_started"] * (night.num_rows // 2)
    assert columns["id"] == [f"shot-{index:07d}" for index in range(night.num_rows)]
    assert columns["sha256"][::2] == [key[::-1] for key in columns["content_key"][::2]]
    assert columns["prompt"][-2].startswith(f"take {night.num_rows - 2}: ")
    page = (run / "report.html").read_text()
    assert len(page) < 5_000_000
    assert f"2,000 of {night.num_done:,} clips" in page


@STORES
def test_an_evenings_manifest_is_resumed_in_seconds(evening: Night, request_s: float) -> None:
    result = resumed(evening, request_s, timeout_s=60)
    check_plan(result, evening, within_s=20, within_mb=400)
    check_results(result, evening)


@pytest.mark.long
@pytest.mark.timeout(1200)
@STORES
def test_a_million_rows_are_resumed_in_a_minute_and_two_gigabytes(night: Night, request_s: float) -> None:
    result = resumed(night, request_s, timeout_s=600)
    check_plan(result, night, within_s=60, within_mb=2_000)
    assert max(peak_mb for _, peak_mb in result["phases"].values()) < 2_500
    check_results(result, night)
