"""Adapter (LoRA) files by URI: whether one fits the model's checkpoint, its hash, and a copy on this machine.

Only headers are compared, so a bad adapter is found before a model is built and without torch. Fusing is the model's
matter (`pipeline/model/adapters.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage.filesystem import is_local, local_path, open_for_reading, sha256_of, storage_error

MAX_HEADER_BYTES = 100 << 20
NUM_PROBLEMS_SHOWN = 3
_KEY = re.compile(r"diffusion_model\.(.+)\.lora_([AB])\.weight")

Shapes = Mapping[str, tuple[int, ...]]


class AdapterShelf:
    """Looks at each adapter of a job once. `checkpoint` is the URI of the file that adapters are fused into.

    `hashes` holds the sha256 of files that were hashed before, by URI.
    """

    def __init__(self, checkpoint: str, hashes: Mapping[str, str] | None = None) -> None:
        self._checkpoint = checkpoint
        self._hashes = hashes or {}
        self._weights: Shapes | None = None
        self._verdicts: dict[str, str | UsageError] = {}

    def sha256(self, uri: str) -> str:
        """The hash of an adapter that fits the checkpoint; UsageError if it cannot be read or does not fit."""
        if uri not in self._verdicts:
            try:
                self._verdicts[uri] = self._examined(uri)
            except UsageError as error:
                self._verdicts[uri] = error
        verdict = self._verdicts[uri]
        if isinstance(verdict, UsageError):
            raise verdict
        return verdict

    def _examined(self, uri: str) -> str:
        problems = misfits(header_shapes(uri), self._checkpoint_weights())
        if problems:
            shown = "; ".join(problems[:NUM_PROBLEMS_SHOWN])
            more = f"; and {len(problems) - NUM_PROBLEMS_SHOWN} more" if len(problems) > NUM_PROBLEMS_SHOWN else ""
            raise UsageError(f"{shown}{more}; use an adapter that was trained for this model")
        if uri in self._hashes:
            return self._hashes[uri]
        digest = hashlib.sha256()
        with open_for_reading(uri) as stream:
            while block := stream.read(16 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _checkpoint_weights(self) -> Shapes | None:
        """None if the checkpoint is out of reach from here: the workers that hold it will compare."""
        if self._weights is None:
            try:
                self._weights = header_shapes(self._checkpoint)
            except UsageError:
                return None
        return self._weights


def header_shapes(uri: str) -> Shapes:
    """Name -> shape of every tensor of a safetensors file; UsageError if it is none."""
    try:
        with open_for_reading(uri) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            entries = json.loads(stream.read(length))
            return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"it is not a safetensors file ({error}); fetch it again") from error


def misfits(adapter: Shapes, checkpoint: Shapes | None) -> list[str]:
    """What keeps an adapter in the published key format from being fused; with None only its own form is judged."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = []
    for name, shape in adapter.items():
        match = _KEY.fullmatch(name)
        if match is None:
            problems.append(f"{name} is not a key of the form diffusion_model.<module>.lora_A.weight")
        else:
            pairs.setdefault(match[1], {})[match[2]] = shape
    if not pairs:
        return problems or ["it holds no tensors"]
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            problems.append(f"{module} must have lora_A (rank, in) and lora_B (out, rank), got {pair}")
        elif checkpoint is not None:
            weight = checkpoint.get(f"model.diffusion_model.{module}.weight")
            made = (pair["B"][0], pair["A"][1])
            if weight is None:
                problems.append(f"the model has no {module}")
            elif weight != made:
                problems.append(f"{module} is {list(weight)} in the model, {list(made)} in the adapter")
    return problems


def local_adapter(uri: str, sha256: str, cache: Path) -> Path:
    """The adapter on this machine: itself, or a copy in `cache` that is fetched once and checked by hash."""
    if is_local(uri):
        return local_path(uri)
    target = cache.expanduser() / "adapters" / f"{sha256}.safetensors"
    if target.is_file():
        return target
    part = target.with_name(f".{sha256[:16]}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_for_reading(uri) as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
        if sha256_of(part) != sha256:
            raise UsageError(f"{uri} must be the file that was planned with, got another; run the same command again")
        part.replace(target)
    except OSError as error:
        raise storage_error(error, f"fetching {uri}") from error
    finally:
        part.unlink(missing_ok=True)
    return target
