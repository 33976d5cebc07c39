"""One store on a disk and one in a bucket: what holds for the one must hold for the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import Store


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return LocalStore(tmp_path / "out")
    return ObjectStore(request.getfixturevalue("bucket") + "/some/out")
