"""Packs of golden folders: how the recorded data of `tests/fixtures` is stored and read; plain numpy, no torch.

A pack (`tests/fixtures/<folder>.pack`) is one xz stream: 8 bytes of length, a JSON list of files, their data. Files
that are not safetensors lie there as they are. Of a safetensors file the header is kept byte for byte; the data is
kept as

- its difference from random numbers, for tensors that were drawn from torch's generator: those numbers are drawn again,
  and only their last bits differ;
- byte planes, all first bytes, then all second ones, since of an unknown float only sign and exponent compress.

`tests/pack_golden.py` writes packs; `tests/fixtures/README.md` says what is in them.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1, "BOOL": 1}
GROUP = 16  # torch draws normal numbers in groups of 16: 8 of 8 pairs'


class GoldenFolders:
    """The golden folders as paths: `folders / "dit_ltx2_0" / "model.safetensors"`. Naming a folder unpacks it, once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __truediv__(self, name: str) -> Path:
        folder = name.split("/")[0]
        if not (self._root / folder).exists():
            unpack(folder, self._root)
        return self._root / name


def names() -> list[str]:
    """Every packed folder."""
    return sorted(path.stem for path in FIXTURES.glob("*.pack"))


def unpack(folder: str, root: Path) -> None:
    """Writes the folder's files, and those that lie loose in `tests/fixtures/<folder>`, under `root/folder`."""
    files = read(folder)
    (root / folder).mkdir()
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    if (FIXTURES / folder).exists():
        shutil.copytree(FIXTURES / folder, root / folder, dirs_exist_ok=True)


def read(folder: str) -> dict[str, bytes]:
    """File name -> content.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = FIXTURES / f"{folder}.pack"
    if not path.exists():
        raise FileNotFoundError(f"golden folder {folder!r} is not packed; there are {', '.join(names())}")
    return decode(path.read_bytes())


def encode(files: dict[str, bytes], draws: dict[str, dict[str, list[float]]]) -> bytes:
    """The pack of these files.

    Args:
        files: name -> content.
        draws: file -> tensor -> seed, offset and scale for `normals`; for tensors that are about that.
    """
    entries: list[dict[str, Any]] = []
    bodies = []
    for name, content in sorted(files.items()):
        entry: dict[str, Any] = {"name": name, "bytes": len(content)}
        if name.endswith(".safetensors"):
            header, content = split(content)
            entry |= {"header": header.decode(), "draws": draws.get(name, {})}
            content = _predicted(bytearray(content), entry, _bits_less)
            content = _gathered(content, json.loads(header))
        entries.append(entry)
        bodies.append(content)
    index = json.dumps(entries).encode()
    return lzma.compress(join(index, b"".join(bodies)), preset=9 | lzma.PRESET_EXTREME)


def decode(pack: bytes) -> dict[str, bytes]:
    """The files that `encode` was given."""
    index, body = split(lzma.decompress(pack))
    files = {}
    for entry in json.loads(index):
        header = entry.get("header", "").encode()
        size = entry["bytes"] - (8 + len(header) if header else 0)
        content, body = body[:size], body[size:]
        if header:
            content = join(header, _predicted(_scattered(content, json.loads(header)), entry, _bits_more))
        files[entry["name"]] = bytes(content)
    return files


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file, or of a pack: the header's length in 8 bytes comes first."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def join(header: bytes, data: bytes | bytearray) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensors_of(header: dict[str, Any]) -> Iterator[tuple[str, str, slice]]:
    """Name, dtype, and place in the data of every tensor, in the order of the data."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        yield name, entry["dtype"], slice(*entry["data_offsets"])


@lru_cache(maxsize=4)
def uniforms(seed: int) -> np.ndarray:
    """The first numbers of torch's CPU generator for float32, in [0, 1): 24 bits of each draw of a Mersenne twister."""
    # RandomState is frozen: the same numbers in every version of numpy.
    draws = np.random.RandomState(seed).randint(0, 2**32, size=2**21, dtype=np.uint32)
    return (draws & 0xFFFFFF).astype(np.float32) / np.float32(2**24)


def normals(seed: int, offset: int, count: int) -> np.ndarray:
    """`torch.randn(count)` after `offset` draws, but for the last bits; `count` is a multiple of 16.

    Box and Muller's transform, in float32 as torch does it. Logarithm and cosine are rounded from float64, so that all
    machines get the same bits (but for one value in 1e8 perhaps, which then is one unit in the last place off).
    """
    groups = uniforms(seed)[offset : offset + count].reshape(-1, 2, GROUP // 2)
    radius = np.sqrt(np.float32(-2) * np.log(1 - groups[:, 0], dtype=np.float64).astype(np.float32))
    turn = (np.float32(2 * np.pi) * groups[:, 1]).astype(np.float64)
    directions = np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    return (radius[:, None] * directions).ravel()


def _predicted(data: bytearray, entry: dict[str, Any], change: Any) -> bytearray:
    """The data with `change(tensor's bits, expected bits)` done to every drawn tensor; a rest of a group stays."""
    for name, _, place in tensors_of(json.loads(entry["header"])):
        if name in entry["draws"]:
            seed, offset, scale = entry["draws"][name]
            count = (place.stop - place.start) // 4 // GROUP * GROUP
            bits = np.frombuffer(data, np.uint32, count, place.start)
            bits[:] = change(bits, (normals(seed, offset, count) * np.float32(scale)).view(np.uint32))
    return data


def _bits_less(bits: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The difference, its sign in the last bit, so that small ones of either sign have many zeros."""
    difference = (bits - expected).view(np.int32)
    return ((difference << 1) ^ (difference >> 31)).view(np.uint32)


def _bits_more(coded: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return expected + ((coded >> 1) ^ (0 - (coded & 1)))


def _gathered(data: bytes | bytearray, header: dict[str, Any]) -> bytes:
    """The tensors of each item size after one another, as byte planes."""
    gathered = []
    for width in sorted(set(ITEM_BYTES.values())):
        places = [place for _, dtype, place in tensors_of(header) if ITEM_BYTES[dtype] == width]
        items = np.frombuffer(b"".join(data[place] for place in places), np.uint8)
        gathered.append(items.reshape(-1, width).T.tobytes())
    return b"".join(gathered)


def _scattered(gathered: bytes, header: dict[str, Any]) -> bytearray:
    data = bytearray(len(gathered))
    for width in sorted(set(ITEM_BYTES.values())):
        places = [place for _, dtype, place in tensors_of(header) if ITEM_BYTES[dtype] == width]
        size = sum(place.stop - place.start for place in places)
        items = np.frombuffer(gathered[:size], np.uint8).reshape(width, -1).T.tobytes()
        gathered = gathered[size:]
        for place in places:
            length = place.stop - place.start
            data[place], items = items[:length], items[length:]
    return data
