"""Shared fixtures: golden data, and a bucket served by an S3 server in a process of its own.

Tests read nothing outside the repository; what they compare with lies packed in `tests/fixtures`.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from tests.golden import GoldenFolders

if TYPE_CHECKING:
    from tests.golden_case import GoldenCase

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
CLIENTS: dict[str, dict[str, Any]] = {}
START_S = 20
# Ministack plays much of AWS beside S3: only that, on this machine only, and without looking for Docker.
MINISTACK = {"SERVICES": "s3", "BIND_HOST": "127.0.0.1", "MINISTACK_HOST": "127.0.0.1", "LOG_LEVEL": "ERROR",
             "SFTP_ENABLED": "0", "IOT_MTLS_ENABLED": "0", "DOCKER_HOST": "unix:///nonexistent"}  # fmt: skip


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


def _start(server: str, port: int) -> subprocess.Popen[bytes]:
    if importlib.util.find_spec(server) is None:
        pytest.skip(f"{server} is not installed")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if server == "moto":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, **quiet)
    else:
        environ = {**os.environ, **CREDENTIALS, **MINISTACK, "GATEWAY_PORT": str(port)}
        process = subprocess.Popen([sys.executable, "-m", "ministack"], env=environ, **quiet)
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return process
        except OSError:
            assert process.poll() is None and time.monotonic() < end, f"{server} did not start"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Callable[[str], str]]:
    """Gives the URL of the server of that name, moto or ministack, which is started when it is first asked for."""
    processes: list[subprocess.Popen[bytes]] = []
    urls: dict[str, str] = {}

    def url_of(server: str) -> str:
        if server not in urls:
            port = free_port()
            processes.append(_start(server, port))
            urls[server] = f"http://127.0.0.1:{port}"
        return urls[server]

    try:
        yield url_of
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def s3_at(url: str) -> Iterator[str]:
    """S3 is at `url` for this process and those it starts, by its environment with credentials, as a user would."""
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")}
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=url)
    # fsspec keeps its clients, which keep the URL that they found and take long to make: so each URL has its own.
    s3: Any = fsspec.get_filesystem_class("s3")
    others, s3._cache = s3._cache, CLIENTS.setdefault(url, {})
    try:
        yield url
    finally:
        s3._cache = others
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def make_bucket() -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def s3_endpoint(s3_server: Callable[[str], str]) -> Iterator[str]:
    """The URL of a fresh S3 server, which is what s3:// means from now on."""
    with s3_at(s3_server("moto")) as url:
        yield url


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    return make_bucket()
