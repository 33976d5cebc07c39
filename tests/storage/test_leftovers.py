"""Local files of processes that were killed: removed by whoever comes next, and nobody else's."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.storage import models
from pipeline.storage.adapters import local_adapter
from pipeline.storage.models import PART_PREFIX, fetch_checked, local_copy, stage
from pipeline.storage.object_store import SCRATCH_PREFIX, ObjectStore
from pipeline.storage.processes import start_ticks, writer, writer_is_gone


def named(pid: int, start: str | None = None) -> str:
    """What the process `pid` of this place, which started at `start`, begins its files' names with."""
    return f"{writer().partition('-')[0]}-{pid}-{start or start_ticks(pid)}"


@pytest.fixture
def dead() -> str:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    name = named(process.pid)
    process.communicate()
    return name


def test_a_writer_is_gone_when_its_process_is_or_another_has_its_number(dead: str) -> None:
    assert writer_is_gone(f"{dead}-x") and writer_is_gone(dead)
    assert writer_is_gone(named(os.getpid(), "1")), "the number was given again"
    alive = (writer(), named(os.getppid()), "elsewhere-1-1-x", "foo", "a-b-c", "")
    assert not any(writer_is_gone(name) for name in alive)


def test_scratch_folders_end_with_their_run_or_with_the_next_start(
    bucket: str, dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{SCRATCH_PREFIX}{dead}-run-0-abc"
    left.mkdir()
    (left / "clip.mp4").write_bytes(b"half")
    worker, driver = ObjectStore(f"{bucket}/out"), ObjectStore(f"{bucket}/out")
    driver.sweep(0)
    assert not left.exists()
    folders = [worker.scratch("run-1"), worker.scratch("run-11")]
    driver.sweep(0)
    driver.delete_folder("_attempts/run-1")
    assert [folder.exists() for folder in folders] == [False, True]


def test_parts_of_a_killed_fetch_of_a_model_are_removed_by_the_next(bucket: str, dead: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"weights")
    fingerprint = stage(source, "m", {"weights": "weights"}, {}, {})
    fsspec.filesystem("s3").put(f"{source}/", f"{bucket}/m/", recursive=True)
    target = tmp_path / "cache" / fingerprint[:16]
    target.mkdir(parents=True)
    parts = {f"{dead}-a": False, f"{writer()}-b": True, "elsewhere-1-1-c": True, "elsewhere-1-1-old": False}
    for name in parts:
        (target / f"{PART_PREFIX}{name}").write_bytes(b"wei")
    os.utime(target / f"{PART_PREFIX}elsewhere-1-1-old", (time.time() - 4000, time.time() - 4000))
    assert local_copy(f"{bucket}/m", "m", tmp_path / "cache") == target
    assert (target / "weights").read_bytes() == b"weights"
    assert {name: (target / f"{PART_PREFIX}{name}").exists() for name in parts} == parts


def test_workers_of_a_machine_fetch_a_model_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"weights")
    stage(source, "m", {"weights": "weights"}, {}, {})
    fsspec.filesystem("s3").put(f"{source}/", f"{bucket}/m/", recursive=True)
    both_fetch, fetched = threading.Barrier(2), []

    def fetch(uri: str, *given: Any) -> None:
        fetched.append(uri)
        with suppress(threading.BrokenBarrierError):
            both_fetch.wait(1.0)
        fetch_checked(uri, *given)

    monkeypatch.setattr(models, "fetch_checked", fetch)
    with ThreadPoolExecutor(2) as workers:
        copies = list(workers.map(lambda _: local_copy(f"{bucket}/m", "m", tmp_path / "cache"), range(2)))
    assert fetched == [f"{bucket}/m/weights"]
    assert copies[0] == copies[1] and (copies[0] / "weights").read_bytes() == b"weights"


def test_parts_of_a_killed_fetch_of_an_adapter_are_removed_by_the_next(bucket: str, dead: str, tmp_path: Path) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/a.safetensors", b"weights")
    cache = tmp_path / "adapters"
    cache.mkdir()
    left, growing = (cache / f"{PART_PREFIX}{name}" for name in (f"{dead}-a", f"{writer()}-b"))
    for part in (left, growing):
        part.write_bytes(b"wei")
    copy = local_adapter(f"{bucket}/a.safetensors", hashlib.sha256(b"weights").hexdigest(), tmp_path)
    assert {*cache.iterdir()} == {copy, growing}
