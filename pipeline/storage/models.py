"""A model's files on disk and their fingerprint: hashed once when they are staged, kept in a sidecar.

At the start of a job only sizes are compared, so a 43 GB checkpoint costs nothing; the hash was paid for before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.storage.filesystem import write_atomically


class NotStaged(UsageError):
    """A model whose files were not hashed here yet."""


SIDECAR = "fingerprint.{model}.json"


def sidecar_path(folder: Path, model: str) -> Path:
    return folder / SIDECAR.format(model=model)


def stage(folder: Path, model: str, parts: Mapping[str, str]) -> str:
    """Hash the files of `parts` (part -> file or folder, relative to `folder`) into a sidecar; returns the fingerprint.

    Raises UsageError that names every part that is missing.
    """
    missing = [f"{part} {folder / name}" for part, name in parts.items() if not (folder / name).exists()]
    if missing:
        raise UsageError(
            f"model {model} must have all its files, missing: {', '.join(missing)}; see conf/model/{model}.yaml"
        )
    hashes: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = {}
    for part, name in parts.items():
        base = folder / name
        for file in sorted(p for p in base.rglob("*") if p.is_file()) if base.is_dir() else [base]:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            # The fingerprint is of contents: where the files lie and what the checkpoint file is called is no part.
            hashes[f"{part}/{file.relative_to(base).as_posix()}"] = digest
            files[str(Path(name) / file.relative_to(base))] = {"sha256": digest, "size_bytes": file.stat().st_size}
    whole = json.dumps(hashes, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    sidecar = {"model": model, "fingerprint": fingerprint, "files": files}
    write_atomically(sidecar_path(folder, model), json.dumps(sidecar, indent=1).encode())
    return fingerprint


def fingerprint(folder: Path, model: str) -> str:
    """The staged model's fingerprint; UsageError if it is not staged or its files are not those that were hashed."""
    way_out = f"run: python -m jobs.stage_weights model={model} model.folder={folder}"
    try:
        sidecar: dict[str, Any] = json.loads(sidecar_path(folder, model).read_bytes())
    except FileNotFoundError as error:
        raise NotStaged(f"model {model} must be staged, got no {sidecar_path(folder, model)}; {way_out}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{sidecar_path(folder, model)} must be readable JSON, got: {error}; {way_out}") from error
    changed = [
        name for name, facts in sidecar["files"].items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != facts["size_bytes"]
    ]  # fmt: skip
    if changed:
        shown = ", ".join(changed[:5])
        raise UsageError(
            f"files of model {model} in {folder} must be those that were staged, changed or missing: {shown}; {way_out}"
        )
    return str(sidecar["fingerprint"])
