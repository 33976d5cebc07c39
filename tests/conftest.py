"""Shared fixtures: golden data, and a bucket served by moto's S3 server in a process of its own.

Tests read nothing outside the repository; what they compare with lies packed in `tests/fixtures`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import fsspec
import pytest

from tests.golden import GoldenFolders

if TYPE_CHECKING:
    from tests.golden_case import GoldenCase

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> GoldenFolders:
    """The golden folders: `fixtures / "dit_ltx2_0" / "model.safetensors"` is a path. Naming a folder unpacks it."""
    return GoldenFolders(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def golden(fixtures: GoldenFolders) -> Callable[[str], GoldenCase]:
    """Reads the case of a name such as vae_ltx2_0/case_decode."""
    from tests.golden_case import read_case  # suites without torch use this file too

    return lambda name: read_case(fixtures / f"{name}.safetensors")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A fresh S3 server's URL, set in this process's environment with credentials, as a user would."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")}
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=url)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
