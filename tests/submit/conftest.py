"""A Ray cluster of one node as a user starts it: default settings, its own ports, its own home with a token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import CREDENTIALS, free_port, make_bucket

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 60
AWS = (*CREDENTIALS, "AWS_ENDPOINT_URL")
# Small enough that a clip takes a fraction of a second.
CLIP = {"width": 64, "height": 64, "num_frames": 9}


@dataclass(frozen=True)
class Head:
    """A running head node, and the environment of a user who has its token."""

    address: str
    gcs_address: str
    environ: dict[str, str]
    token: str
    model_folder: Path

    def command(self, output: Path | str, *arguments: str) -> list[str]:
        base = [f"address={self.address}", f"output={output}", f"model.folder={self.model_folder}"]
        return [sys.executable, "-m", "jobs.submit", *base, *arguments]

    def submit(self, output: Path | str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(output, *arguments), cwd=ROOT, env={**self.environ, **environ}, text=True,
            capture_output=True, timeout=100, check=False,
        )  # fmt: skip

    def request(self, method: str, path: str, **fields: Any) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        body = json.dumps(fields).encode() if fields else None
        request = urllib.request.Request(f"{self.address}{path}", body, headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return bytes(answer.read())

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Meanwhile somebody else's job holds both CPUs of the head node."""
        job_id = f"neighbour-{uuid.uuid4().hex[:8]}"
        self.request("POST", "/api/jobs/", entrypoint="sleep 600", submission_id=job_id, entrypoint_num_cpus=2)
        end = time.monotonic() + 30
        while b'"RUNNING"' not in self.request("GET", f"/api/jobs/{job_id}"):
            assert time.monotonic() < end, "the neighbour did not start"
            time.sleep(0.2)
        try:
            yield
        finally:
            self.request("POST", f"/api/jobs/{job_id}/stop")


@dataclass(frozen=True)
class InBucket:
    """Renders submitted to `head` with everything in a bucket, whose credentials the job alone is given."""

    head: Head
    bucket: str
    model_folder: str
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        return {name: os.environ[name] for name in AWS}

    def manifest(self, rows: Sequence[dict[str, Any]], name: str = "prompts.parquet") -> str:
        fsspec.filesystem("s3").put(str(write_manifest(self.folder / name, rows)), f"{self.bucket}/{name}")
        return f"manifest={self.bucket}/{name}"

    def settings(self, *arguments: str) -> tuple[str, ...]:
        return (f"{self.bucket}/out", f"model.folder={self.model_folder}", f"env=[{','.join(AWS)}]", *arguments)

    def submit(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.head.submit(*self.settings(*arguments), **self.environ, **environ)


def small_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"clip-{i}", "prompt": f"prompt number {i}", **CLIP} for i in range(count)]


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def _user(home: Path) -> dict[str, str]:
    """The environment of a user at `home` without any setting of Ray or S3; jobs find this Python as `python`."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', '')}"
    return {**environ, "HOME": str(home), "PYTHONUNBUFFERED": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("ray", reason="ray is not installed")
    home = tmp_path_factory.mktemp("home")
    environ = _user(home)
    ray = str(Path(sys.executable).parent / "ray")
    token = subprocess.run([ray, "get-auth-token", "--generate"], env=environ, text=True, capture_output=True,
                           check=True, timeout=60).stdout.strip()  # fmt: skip
    assert (home / ".ray" / "auth_token").read_text().strip() == token
    model_folder = home / "nano"
    staged = [sys.executable, "-m", "jobs.stage_weights", f"model.folder={model_folder}"]
    subprocess.run(staged, cwd=ROOT, env=environ, check=True, capture_output=True, timeout=120)

    # Sockets lie in it, whose paths may have 107 characters at most.
    temporary = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    port, gcs_port = free_port(), free_port()
    arguments = ["--head", f"--port={gcs_port}", f"--dashboard-port={port}", f"--temp-dir={temporary}",
                 "--num-cpus=2", "--block", f"--dashboard-agent-listen-port={free_port()}",
                 f"--ray-client-server-port={free_port()}",
                 "--include-dashboard=true", "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen([ray, "start", *arguments], env=environ, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    try:
        head = Head(f"http://127.0.0.1:{port}", f"127.0.0.1:{gcs_port}", environ, token, model_folder)
        _wait_until_ready(head, process, home / "head.log")
        yield head
    finally:
        _end(process, temporary)


@pytest.fixture(scope="session")
def model_in_bucket(head: Head, s3_endpoint: str) -> str:
    folder = f"{make_bucket()}/nano"
    fsspec.filesystem("s3").put(f"{head.model_folder}/", f"{folder}/", recursive=True)
    return folder


@pytest.fixture
def in_bucket(head: Head, bucket: str, model_in_bucket: str, tmp_path: Path) -> InBucket:
    return InBucket(head, bucket, model_in_bucket, tmp_path)


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        # Also the list of nodes: the dashboard answers before the node has joined.
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if b'"ALIVE"' in head.request("GET", "/api/v0/nodes"):
                return
        time.sleep(0.5)
    raise AssertionError(f"no Ray head within {START_S} s: {log.read_text()}")


def _end(process: subprocess.Popen[bytes], temporary: Path) -> None:
    """End this head and what it started, and nothing else: other tests may run a Ray of their own."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{temporary}/".encode() in (entry / "cmdline").read_bytes() + b"/":
                os.kill(int(entry.name), signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(15)
    shutil.rmtree(temporary, ignore_errors=True)
