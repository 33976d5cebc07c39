"""The commands as a user runs them: a staged nano model, manifests, and processes with their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Small enough that a clip takes a fraction of a second.
CLIP = {"width": 64, "height": 64, "num_frames": 9}


def command(job: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", *arguments]


def run_command(job: str, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(job, *arguments), cwd=ROOT, text=True, capture_output=True, timeout=timeout_s, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "nano"
    done = run_command("stage_weights", f"model.folder={folder}")
    assert done.returncode == 0, done.stderr
    assert "fingerprint" in done.stdout
    return folder


Render = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def render(model_folder: Path, tmp_path: Path) -> Render:
    """Run `jobs.render` (or another job) on a manifest into `tmp_path/out`."""

    def run(manifest: Path, *arguments: str, job: str = "render") -> subprocess.CompletedProcess[str]:
        base = (f"manifest={manifest}", f"output={tmp_path / 'out'}", f"model.folder={model_folder}")
        return run_command(job, *base, *arguments)

    return run


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[[Sequence[dict[str, Any]]], Path]:
    return lambda rows: write_manifest(tmp_path / "manifest.parquet", rows)


@dataclass(frozen=True)
class Site:
    """Where a job lies: its manifest, its model, and its output at `root`, a path or a URI."""

    root: str
    arguments: tuple[str, ...]

    def num_committed(self) -> int:
        fs, path = fsspec.url_to_fs(self.root, use_listings_cache=False)
        return len(fs.glob(f"{path}/commits/*.json"))

    def output(self, target: Path) -> Path:
        """The output as a folder, fetched from a bucket as a user would."""
        if "://" not in self.root:
            return Path(self.root)
        fs, path = fsspec.url_to_fs(self.root, use_listings_cache=False)
        fs.get(f"{path}/", f"{target}/", recursive=True)
        return target


def on_disk(rows: Sequence[dict[str, Any]], model_folder: Path, tmp_path: Path) -> Site:
    path, root = write_manifest(tmp_path / "manifest.parquet", rows), tmp_path / "out"
    return Site(str(root), (f"manifest={path}", f"output={root}", f"model.folder={model_folder}"))


def in_bucket(bucket: str, rows: Sequence[dict[str, Any]], model_folder: Path, tmp_path: Path) -> Site:
    fs = fsspec.filesystem("s3")
    fs.put(str(write_manifest(tmp_path / "manifest.parquet", rows)), f"{bucket}/prompts/date=2026-11-20/a.parquet")
    fs.put(f"{model_folder}/", f"{bucket}/models/nano/", recursive=True)
    return Site(
        f"{bucket}/out",
        (f"manifest={bucket}/prompts", f"output={bucket}/out", f"model.folder={bucket}/models/nano",
         f"model.cache={tmp_path / 'cache'}"),
    )  # fmt: skip


@pytest.fixture
def site(request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path) -> Callable[..., Site]:
    """Prepare a job of so many rows `on` a "disk" or a "bucket"."""

    def prepare(on: str, num_rows: int) -> Site:
        rows = small_rows(num_rows)
        if on == "disk":
            return on_disk(rows, model_folder, tmp_path)
        return in_bucket(request.getfixturevalue("bucket"), rows, model_folder, tmp_path)

    return prepare


def small_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"clip-{i}", "prompt": f"prompt number {i}", **CLIP} for i in range(count)]
