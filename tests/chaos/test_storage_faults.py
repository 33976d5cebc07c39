"""A night in a bucket whose server refuses, forgets, delays, hangs up and falls silent: nothing lost or doubled.

The long form: 1,000 faults.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.chaos.conftest import SEED, FarmSite, keep, plain_rows
from tests.chaos.s3_faults import SeededPlan, faults_before
from tests.end_to_end.checker import check_output


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_faults", "num_rows"), [(20, 30), pytest.param(1000, 900, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_faults_of_the_store_lose_and_double_nothing(
    farm_site: Callable[..., FarmSite], tmp_path: Path, num_faults: int, num_rows: int
) -> None:
    site, started_s = farm_site("bucket", plain_rows(num_rows)), time.monotonic()
    plan = SeededPlan(int(SEED), share=0.1, max_faults=num_faults)
    with faults_before(os.environ["AWS_ENDPOINT_URL"], plan) as proxy:
        site.environment["AWS_ENDPOINT_URL"] = proxy.url
        code, errors = site.run("storage.answer_timeout_s=1", timeout_s=1700)
        num_requests = proxy.num_requests
    assert code == 0, errors
    check_output(site.output(tmp_path / "copy"), site.ids)
    bucket, _, _ = site.root.removeprefix("s3://").partition("/")
    assert fsspec.filesystem("s3").list_multipart_uploads(bucket) == []
    assert plan.counts.total() == num_faults
    keep("storage_faults", faults=dict(plan.counts), total=plan.counts.total(), requests=num_requests, rows=num_rows,
         violations=0, seconds=round(time.monotonic() - started_s, 1))  # fmt: skip
