"""One store on a disk and one in a bucket, on two kinds of S3: what holds for the one must hold for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import Store
from tests.conftest import make_bucket, s3_at

SERVERS = ("moto", "ministack")


@pytest.fixture(params=SERVERS)
def s3_endpoint(request: pytest.FixtureRequest, s3_server: Callable[[str], str]) -> Iterator[str]:
    with s3_at(s3_server(request.param)) as url:
        yield url


@pytest.fixture(params=["disk", *SERVERS])
def store(request: pytest.FixtureRequest, s3_server: Callable[[str], str], tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        yield LocalStore(tmp_path / "out")
        return
    with s3_at(s3_server(request.param)):
        yield ObjectStore(f"{make_bucket()}/some/out")
