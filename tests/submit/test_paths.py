"""Paths that a submitted job cannot reach or keep are refused, before it is sent and inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.entry import RenderJob, compose_job
from pipeline.errors import UsageError
from pipeline.planning.reach import in_submitted_job, refuse_lost_paths, refuse_scattered_output
from tests.submit.conftest import ROOT

# What Ray 2.60's job supervisor sets.
IN_JOB = {
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}})
}


def _job(*overrides: str) -> RenderJob:
    return compose_job(RenderJob, "render", list(overrides))


def _packaged(path: str) -> bool:
    return path == "conf/demo/prompts.parquet"


@pytest.mark.parametrize("output", ["/shared/out", "file:///shared/out", "s3://bucket/out", "~/out"])
def test_urls_and_absolute_paths_last(output: str) -> None:
    refuse_lost_paths(_job(f"output={output}"), in_package=_packaged)
    refuse_lost_paths(_job(f"output={output}", "manifest=./conf/demo/prompts.parquet"), in_package=_packaged)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "output must be a URL or an absolute path in a submitted Ray job, got 'outputs/demo'"),
        (["output=out"], "got 'out'"),
        (["output=./out"], "got './out'"),
        (["output=/o", "report=quote.json"], "report must be a URL or an absolute path"),
        (["output=/o", "manifest=mine.parquet"], "manifest must be a URL, an absolute path or inside the submitted"),
        (["output=/o", "manifest=../m.parquet"], "got '../m.parquet'"),
        (["output=/o", "model=ltx2_19b_distilled", "model.folder=models"], "model.folder must be absolute"),
    ],
)
def test_relative_paths_are_refused_unless_packaged(overrides: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_lost_paths(_job(*overrides), in_package=_packaged)
    assert says in str(caught.value)


def test_a_nodes_own_disk_is_refused_on_several_nodes_only() -> None:
    local = _job("output=/data/out")
    refuse_scattered_output(local, 1)
    with pytest.raises(UsageError, match=r"cluster of 3 nodes, got '/data/out'.*cluster.shared_output=true"):
        refuse_scattered_output(local, 3)
    with pytest.raises(UsageError):
        refuse_scattered_output(_job("output=file:///data/out"), 2)
    refuse_scattered_output(_job("output=s3://bucket/out"), 3)
    refuse_scattered_output(_job("output=/data/out", "cluster.shared_output=true"), 3)


def test_only_the_environment_of_a_submitted_job_counts_as_one() -> None:
    assert in_submitted_job(IN_JOB)
    assert not in_submitted_job({})
    assert not in_submitted_job({"RAY_ADDRESS": "auto", "RAY_JOB_ID": "01000000"})


@pytest.mark.parametrize("argument", ["output=outputs/x", "manifest=nowhere.parquet"])
def test_jobs_render_itself_refuses_inside_a_submitted_job(tmp_path: Path, argument: str) -> None:
    command = [sys.executable, "-m", "jobs.render", "dry_run=true", f"output={tmp_path}", argument]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **IN_JOB}, text=True, capture_output=True, timeout=60,
                          check=False)  # fmt: skip
    assert done.returncode == 2
    assert f"got {argument.split('=')[1]!r}" in done.stderr and "submitted" in done.stderr
    assert done.stderr.count("\n") == 1
