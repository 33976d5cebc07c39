"""The rows of measurements, which say when and where they were taken: a JSON object a line, a file for each kind.

Knows nothing of what is measured, and loads without torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What the seconds depend on; those that are not installed are left out.
_PACKAGES = ("torch", "triton", "diffusers", "nvidia-cudnn-cu13", "flash-attn-4", "xfuser", "ray")


def new_row(what: str, **facts: Any) -> Row:
    """A row of kind `what` that says when, on what hardware and with which versions it was measured."""
    return {"at": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, **facts,
            "hardware": hardware(), "versions": versions()}  # fmt: skip


def append(folder: Path, row: Row) -> None:
    """Add a row to the file of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{row['what']}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path, kind: str) -> list[Row]:
    """The rows of a file, oldest first; none if there is no such file."""
    path = folder / f"{kind}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hardware() -> Row:
    """GPUs, processor and memory of this machine."""
    gpus: list[str] = []
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"gpus": gpus, "cpu": platform.processor() or platform.machine(), "num_cpus": os.cpu_count(),
            "memory_bytes": memory}  # fmt: skip


def versions() -> dict[str, str]:
    """Python and the packages that seconds depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
