"""Adapter (LoRA) files by URI: whether one fits the model's checkpoint, its hash, and a copy on this machine.

Only headers are compared, so a bad adapter is found before a model is built and without torch. Fusing is the model's
matter (`pipeline/model/adapters.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from pipeline.errors import PipelineError, UsageError
from pipeline.storage.filesystem import is_local, local_path, open_for_reading, sha256_of, size_of, storage_error
from pipeline.storage.models import fetch_checked, sweep_parts

MAX_HEADER_BYTES = 100 << 20
NUM_PROBLEMS_SHOWN = 3
_KEY = re.compile(r"diffusion_model\.(.+)\.lora_([AB])\.weight")
# Under the denoiser's names, but parts of the text path, which adapters leave alone.
_CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
# As the format names them.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_PLANNED = "must be the file that was planned with"
_OTHER = f"{_PLANNED}, got another; run the same command again"


class Stored(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


Header = Mapping[str, Stored]


class AdapterShelf:
    """Looks at each adapter of a job once. `checkpoint` is the URI of the file that adapters are fused into.

    `hashes` holds the sha256 of files that were hashed before, by URI.
    """

    def __init__(self, checkpoint: str, hashes: Mapping[str, str] | None = None) -> None:
        self._checkpoint = checkpoint
        self._hashes = hashes or {}
        self._weights: Header | None = None
        self._verdicts: dict[str, str | PipelineError] = {}

    def sha256(self, uri: str) -> str:
        """The hash of an adapter that fits the checkpoint; UsageError if there is none or it does not fit.

        StorageUnavailable if it cannot be read to its end.
        """
        if uri not in self._verdicts:
            try:
                self._verdicts[uri] = self._examined(uri)
            except PipelineError as error:
                self._verdicts[uri] = error
        verdict = self._verdicts[uri]
        if isinstance(verdict, PipelineError):
            raise verdict
        return verdict

    def _examined(self, uri: str) -> str:
        problems = misfits(header_of(uri), self._checkpoint_weights())
        if problems:
            shown = "; ".join(problems[:NUM_PROBLEMS_SHOWN])
            more = f"; and {len(problems) - NUM_PROBLEMS_SHOWN} more" if len(problems) > NUM_PROBLEMS_SHOWN else ""
            raise UsageError(f"{shown}{more}; use an adapter that was trained for this model")
        if uri in self._hashes:
            return self._hashes[uri]
        digest = hashlib.sha256()
        with _reading(uri) as stream:
            while block := stream.read(16 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _checkpoint_weights(self) -> Header | None:
        """None if the checkpoint is out of reach from here: the workers that hold it will compare."""
        if self._weights is None:
            try:
                self._weights = header_of(self._checkpoint)
            except PipelineError:
                return None
        return self._weights


@contextmanager
def _reading(uri: str) -> Iterator[IO[bytes]]:
    """`open_for_reading`, with our storage error for what the library behind a URI raises in the middle of a file."""
    try:
        with open_for_reading(uri) as stream:
            yield stream
    except PipelineError:
        raise
    except Exception as error:
        raise storage_error(error if isinstance(error, OSError) else OSError(error), f"reading {uri}") from error


def header_of(uri: str) -> Header:
    """Every tensor of a safetensors file by its name; UsageError if it is none, or not whole."""
    with _reading(uri) as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {length} bytes")
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        header = {name: Stored(tuple(entry["shape"]), str(entry["dtype"])) for name, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"it is not a safetensors file ({error}); fetch it again") from error
    if (size_bytes := size_of(uri)) != end:
        raise UsageError(f"it must have the {end} bytes that its header names, got {size_bytes}; fetch it again")
    return header


def misfits(adapter: Header, checkpoint: Header | None) -> list[str]:
    """What keeps an adapter in the published key format from being fused; with None only its own form is judged."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = []
    for name, stored in adapter.items():
        match = _KEY.fullmatch(name)
        if match is None:
            problems.append(f"{name} is not a key of the form diffusion_model.<module>.lora_A.weight")
            continue
        pairs.setdefault(match[1], {})[match[2]] = stored.shape
        if stored.dtype not in _FLOATS:
            problems.append(f"{name} must be of a float kind ({', '.join(_FLOATS)}), got {stored.dtype}")
    if not pairs:
        return problems or ["it holds no tensors"]
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            problems.append(f"{module} must have lora_A (rank, in) and lora_B (out, rank), got {pair}")
        elif checkpoint is not None:
            weight = checkpoint.get(f"model.diffusion_model.{module}.weight")
            made = (pair["B"][0], pair["A"][1])
            if weight is None or module.startswith(_CONNECTORS):
                problems.append(f"the model's denoiser has no {module}")
            elif weight.shape != made:
                problems.append(f"{module} is {list(weight.shape)} in the model, {list(made)} in the adapter")
    return problems


def local_adapter(uri: str, sha256: str, cache: Path) -> Path:
    """The adapter on this machine: itself, or a copy in `cache` that is fetched once.

    UsageError if it is gone, or has another hash than `sha256`, that of the plan; a file is hashed once a process.
    """
    if not is_local(uri):
        target = cache.expanduser() / "adapters" / f"{sha256}.safetensors"
        if not target.is_file():
            sweep_parts(target.parent)
            fetch_checked(uri, target, sha256, _OTHER)
        return target
    path = local_path(uri)
    try:
        facts = path.stat()
    except FileNotFoundError as error:
        raise UsageError(f"{uri} {_PLANNED}, got none; put it back") from error
    except OSError as error:
        raise storage_error(error, f"reading {uri}") from error
    if _sha256_of(path, facts.st_mtime_ns, facts.st_size) != sha256:
        raise UsageError(f"{uri} {_OTHER}")
    return path


@cache
def _sha256_of(path: Path, mtime_ns: int, size_bytes: int) -> str:
    """Remembered for as long as the file is the same by these numbers."""
    return sha256_of(path)
