"""Gigabytes a second from warm page cache to the device: python -m tests.bench.weights FILE [--results PATH].

FILE is a checkpoint (`jobs.bench` writes random ones). Sweeps the reader's threads and buffers beside safetensors' own
way; on a machine without a GPU, to the host.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.model.checkpoint import TensorFile
from pipeline.model.pinned_reader import PinnedReader, Read

RESULTS = Path(__file__).parent / "results" / "weights.jsonl"
# (threads, buffers, MiB a buffer)
RINGS = [
    (1, 2, 8),
    (4, 8, 8),
    (8, 16, 4),
    (8, 16, 8),
    (8, 16, 32),
    (16, 32, 8),
    (8, 16, 16),
    (16, 32, 16),
    (16, 32, 32),
]
NUM_ROUNDS = 3


def seconds_of(load: Callable[[], Any]) -> float:
    """The fastest of `NUM_ROUNDS` loads; the first of them may find the file on disk only."""
    took = []
    for _ in range(NUM_ROUNDS):
        started = time.perf_counter()
        held = load()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
        del held
    return min(took)


def read_all(reader: PinnedReader, reads: list[Read]) -> list[Tensor]:
    """As a module is filled."""
    with reader.reading_ahead(reads):
        return [reader.read(*read) for read in reads]


def measure(path: Path, device: str) -> dict[str, float]:
    """Seconds by way."""
    reads = [Read(name, spec) for name, spec in TensorFile(path).tensor_specs().items()]
    seconds = {"safetensors": seconds_of(lambda: load_file(path, device=device))}
    for threads, buffers, mebibytes in RINGS:
        reader = PinnedReader(path, device, buffer_bytes=mebibytes << 20, num_buffers=buffers, num_threads=threads)
        seconds[f"{threads} threads, {buffers} x {mebibytes} MiB"] = seconds_of(partial(read_all, reader, reads))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_bytes = arguments.file.stat().st_size
    row = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "gb": num_bytes / 1e9,
        "gb_per_s": {way: round(num_bytes / 1e9 / s, 2) for way, s in measure(arguments.file, device).items()},
    }
    sys.stdout.write(json.dumps(row) + "\n")
    with arguments.results.open("a") as results:
        results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
