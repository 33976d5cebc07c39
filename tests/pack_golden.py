"""Makes the packs of `tests/fixtures` from a golden set: `python -m tests.pack_golden <golden set> [folder ...]`.

Everything stays bit for bit. The seeds that the set's tensors were drawn with are found by trying.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tests import golden

SEEDS = range(1000, 1750)  # those of the golden set of 2026-11
SMALLEST_DRAWN = 256  # values; what is smaller costs little
FIRST_DRAWS = 250_000  # of a seed, in which it must show up in a file to be tried further

Draws = dict[str, dict[str, list[float]]]


def main(source: Path, folders: list[str]) -> None:
    folders = folders or sorted(path.name for path in source.iterdir() if path.is_dir())
    contents = {
        folder: {path.name: path.read_bytes() for path in (source / folder).iterdir() if path.suffix != ".md"}
        for folder in folders
    }
    draws = _draws({f"{folder}/{name}": files[name] for folder, files in contents.items() for name in files})
    for folder, files in contents.items():
        pack = golden.encode(files, {name: draws[f"{folder}/{name}"] for name in files})
        if golden.decode(pack) != files:
            raise AssertionError(f"{folder}: the pack does not give back what went in")
        (golden.FIXTURES / f"{folder}.pack").write_bytes(pack)
        print(f"{folder:28} {len(pack):9,} bytes of {sum(map(len, files.values())):10,}")  # noqa: T201


def _draws(files: dict[str, bytes]) -> Draws:
    """Seed, offset and scale of the tensors that are normal random numbers of one of `SEEDS`."""
    values = {}
    for file, content in files.items():
        if file.endswith(".safetensors"):
            header, data = golden.split(content)
            for name, dtype, place in golden.tensors_of(json.loads(header)):
                if dtype == "F32" and place.stop - place.start >= 4 * SMALLEST_DRAWN:
                    values[file, name] = np.frombuffer(data[place], np.float32)
    # A pair's angle does not depend on the scale, and is one draw: the second half of a group.
    angles = {
        key: np.arctan2(*value[:16].astype(np.float64).reshape(2, 8)[::-1]) / (2 * np.pi) % 1
        for key, value in values.items()
    }
    found: Draws = {file: {} for file in files}
    for seed in SEEDS:
        if not _offsets(golden.uniforms(seed)[:FIRST_DRAWS], angles):
            continue
        for key, offset in _offsets(golden.uniforms(seed), angles).items():
            count = values[key].size // golden.GROUP * golden.GROUP
            drawn = golden.normals(seed, offset, count).astype(np.float64)
            actual = values[key][:count].astype(np.float64)
            scale = float(np.float32(actual @ drawn / (drawn @ drawn)))
            if np.abs(actual - scale * drawn).max() < 1e-5 * np.abs(actual).max():
                found[key[0]][key[1]] = [seed, offset, scale]
                del angles[key]
    return found


def _offsets(stream: np.ndarray, angles: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], int]:
    """Where in the stream each tensor begins, for those that do."""
    keys = list(angles)
    first = np.array([angles[key][0] for key in keys])
    order = np.argsort(first)
    low, high = (np.searchsorted(first[order], stream + shift) for shift in (-2e-6, 2e-6))
    found = {}
    for place in np.nonzero(high > low)[0]:
        for index in order[low[place] : high[place]]:
            wanted = angles[keys[index]]
            there = stream[place : place + 8]
            if place >= 8 and there.size == 8 and np.median(np.abs(there - wanted)) < 1e-5:
                found[keys[index]] = int(place) - 8
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
