"""Starting the farm of `farm.py` on an output, on a disk or in a bucket, and reading what a user can read of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.end_to_end.conftest import ROOT, write_manifest

CLIP = {"width": 64, "height": 64, "num_frames": 9}
SEED = os.environ.get("CHAOS_SEED", "20261120")
RESULTS = ROOT / "tests" / "bench" / "results" / "chaos.jsonl"


class StartedDriver(subprocess.Popen[str]):
    """Its standard error goes to a file: a pipe that nobody reads stops a driver once 64 KiB are in it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._said = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - as long as the process
        super().__init__(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            env={**os.environ, **environment},
        )

    def said(self, timeout_s: float | None = None) -> str:
        """What it said, once it has ended."""
        self.wait(timeout_s)
        return Path(self._said.name).read_text()


@dataclass
class FarmSite:
    """One output and its manifest; `start` is one driver on it."""

    root: str
    manifest: Path
    ids: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str) -> StartedDriver:
        farm = [sys.executable, "-m", "tests.chaos.farm", f"manifest={self.manifest}", f"output={self.root}"]
        return StartedDriver([*farm, *arguments], self.environment)

    def run(self, *arguments: str, timeout_s: float = 300) -> tuple[int, str]:
        """Exit code and standard error of one driver that runs to its end."""
        process = self.start(*arguments)
        errors = process.said(timeout_s)
        return process.returncode, errors

    def output(self, target: Path) -> Path:
        """The output as a folder, fetched from a bucket as a user would."""
        if "://" not in self.root:
            return Path(self.root)
        fs, path = fsspec.url_to_fs(self.root, use_listings_cache=False)
        fs.get(f"{path}/", f"{target}/", recursive=True)
        return target


def plain_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"clip-{i}", "prompt": f"plain {i}", **CLIP} for i in range(count)]


@pytest.fixture
def farm_site(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., FarmSite]:
    def prepare(on: str, rows: Sequence[dict[str, Any]]) -> FarmSite:
        manifest = write_manifest(tmp_path / "manifest.parquet", rows)
        root = str(tmp_path / "out") if on == "disk" else f"{request.getfixturevalue('bucket')}/out"
        return FarmSite(root, manifest, [row["id"] for row in rows])

    return prepare


def keep(kind: str, **facts: Any) -> None:
    """Add a row to the committed results, if the long form asks for it (`make chaos`)."""
    print(json.dumps({"kind": kind, **facts}))  # noqa: T201 - shown when a test fails
    if os.environ.get("CHAOS_KEEP"):
        with RESULTS.open("a") as stream:
            stream.write(json.dumps({"kind": kind, "seed": SEED, **facts}) + "\n")
