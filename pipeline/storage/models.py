"""A model's files, on a disk or in a bucket, and their fingerprint, hashed once at staging and kept in a sidecar.

At the start of a job only sizes are compared, so a 43 GB checkpoint costs nothing; the hash was paid for before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.storage.filesystem import (
    ABANDONED_AFTER_S,
    is_local,
    join,
    local_path,
    open_for_reading,
    sha256_of,
    size_of,
    storage_error,
    write_atomically,
)
from pipeline.storage.processes import writer, writer_is_gone
from pipeline.storage.store import open_store


class NotStaged(UsageError):
    """A model whose files were not hashed here yet."""


SIDECAR = "fingerprint.{model}.json"
# Stands for a hash where the model's files are not at hand: an estimate needs none.
NOT_STAGED = "not staged"
PART_PREFIX = ".part-"
# Held by whoever fetches into a folder, and where a fetch keeps what is not whole.
LOCK = ".fetch.lock"
UNFINISHED = ".fetch"
# Name of a file -> its sha256 and size_bytes, as a sidecar has them.
Files = Mapping[str, Mapping[str, Any]]


def stage(
    folder: Path,
    model: str,
    parts: Mapping[str, str],
    extras: Mapping[str, str],
    known: Mapping[str, str],
    kept: Mapping[str, Files] | None = None,
) -> str:
    """Hash the files of `parts` (part -> file or folder) into a sidecar in `folder`; returns the fingerprint.

    Names are relative to `folder` unless absolute, here and in the sidecar, so that models can share a text encoder.
    `extras` are in the sidecar and no part of the fingerprint, so that adding an adapter renders nothing again. `known`
    holds the sha256 of files that were hashed a moment ago, by name; `kept` what `staged_files` says of parts that are
    not looked for in `folder`. Raises UsageError that names every part that is missing.
    """
    everything, kept = {**parts, **extras}, kept or {}
    missing = [
        f"{part} {folder / name}"
        for part, name in everything.items()
        if name not in kept and not (folder / name).exists()
    ]
    if missing:
        raise UsageError(
            f"model {model} must have all its files, missing: {', '.join(missing)}; see conf/model/{model}.yaml"
        )
    hashes: dict[str, str] = {}
    files: dict[str, Mapping[str, Any]] = {}
    hashed = _hashed({name: _found(folder, name) for name in everything.values() if name not in kept}, known)
    for part, name in everything.items():
        own = kept[name] if name in kept else hashed[name]
        files |= own
        if part in parts:
            # The fingerprint is of contents: where files lie and what the checkpoint file is called is no part.
            hashes |= {f"{part}/{Path(path).relative_to(name).as_posix()}": own[path]["sha256"] for path in own}
    whole = json.dumps(hashes, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    sidecar = {"model": model, "fingerprint": fingerprint, "files": files}
    write_atomically(folder / SIDECAR.format(model=model), json.dumps(sidecar, indent=1).encode())
    return fingerprint


def _found(folder: Path, name: str) -> dict[str, Path]:
    """The files of a part, which may be one itself, by their names in a sidecar."""
    base = folder / name
    return {str(Path(name) / file.relative_to(base)): file for file in (_files_in(base) if base.is_dir() else [base])}


def _hashed(found: Mapping[str, Mapping[str, Path]], known: Mapping[str, str]) -> dict[str, Files]:
    """Facts of the files of each part. All are hashed side by side: a core does a GB/s, and a model has 68."""
    unknown = {path: file for files in found.values() for path, file in files.items() if path not in known}
    with ThreadPoolExecutor() as threads:
        sha256 = {**known, **dict(zip(unknown, threads.map(sha256_of, unknown.values()), strict=True))}
    return {
        name: {path: {"sha256": sha256[path], "size_bytes": file.stat().st_size} for path, file in files.items()}
        for name, files in found.items()
    }


def staged_files(folder: str, model: str, names: Collection[str]) -> dict[str, Files]:
    """Those of `names` (files and folders of a model) that an earlier staging left whole, with their files' facts."""
    try:
        files = (_read_sidecar(folder, model) or {}).get("files", {})
    except ValueError:
        return {}
    owned = {name: {path: facts for path, facts in files.items() if Path(path).is_relative_to(name)} for name in names}
    changed = _changed(folder, {path: facts for own in owned.values() for path, facts in own.items()})
    return {name: own for name, own in owned.items() if own and not own.keys() & changed}


def fingerprint(folder: str, model: str) -> str:
    """The staged model's fingerprint; `folder` is a path or a URI.

    Raises NotStaged if it has no sidecar, UsageError if its files are not those that were hashed.
    """
    return str(_sidecar(folder, model)["fingerprint"])


def staged_bytes(folder: str, model: str, names: Collection[str]) -> int:
    """Size in bytes of those staged files that `names` (files and folders) hold; raises as `fingerprint` does."""
    files = _sidecar(folder, model)["files"].items()
    return sum(int(facts["size_bytes"]) for path, facts in files if any(Path(path).is_relative_to(n) for n in names))


def staged_hashes(folder: str, model: str) -> dict[str, str]:
    """URI of each file of a staged model -> its sha256, as hashed then."""
    return {join(folder, name): str(facts["sha256"]) for name, facts in _sidecar(folder, model)["files"].items()}


def local_copy(folder: str, model: str, cache: Path) -> Path:
    """The model's folder on this machine: itself, or a copy in `cache` that is fetched once and checked by hash.

    Workers of a machine that ask for it at the same time fetch it once, and wait for it together.
    """
    if is_local(folder):
        return local_path(folder)
    sidecar = _sidecar(folder, model)
    target = cache.expanduser() / str(sidecar["fingerprint"])[:16]
    sweep_parts(target)
    try:
        if _absent(target, sidecar["files"]):
            with alone_in(target):
                for name, facts in _absent(target, sidecar["files"]).items():
                    complaint = "must be the file that was staged, got another; stage the model again"
                    fetch_checked(join(folder, name), target / name, facts["sha256"], complaint)
    except OSError as error:
        raise storage_error(error, f"fetching into {target}") from error
    return target


def _absent(target: Path, files: Files) -> Files:
    """Those that are not in `target` in their size, but for what lies outside the model's folder.

    That is never fetched: it was found here, in its size, with the sidecar.
    """
    own = {name: facts for name, facts in files.items() if not Path(name).is_absolute()}
    return {name: own[name] for name in _changed(str(target), own)}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: of processes that fetch the same into it, all but one find it there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch_checked(uri: str, path: Path, sha256: str, complaint: str) -> None:
    """Copy `uri` to `path`, which appears whole and with this hash; UsageError with `complaint` if it has another."""
    part = path.with_name(f"{PART_PREFIX}{writer()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_for_reading(uri) as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
        if sha256_of(part) != sha256:
            raise UsageError(f"{uri} {complaint}")
        part.replace(path)
    except OSError as error:
        raise storage_error(error, f"fetching {uri}") from error
    finally:
        part.unlink(missing_ok=True)


def sweep_parts(target: Path) -> None:
    """Remove what a killed fetch left: a part is as large as the model."""
    for part in target.rglob(f"{PART_PREFIX}*"):
        with suppress(OSError):  # another worker's, just finished
            old = time.time() - part.stat().st_mtime > ABANDONED_AFTER_S
            if old or writer_is_gone(part.name.removeprefix(PART_PREFIX)):
                part.unlink()


def copy_to(folder: str, staged: Path) -> None:
    """Copy a staged model's files to a URI, the sidecar last: a model with a sidecar is whole."""
    store = open_store(folder)
    for path in sorted(_files_in(staged), key=lambda path: (path.match(SIDECAR.format(model="*")), path)):
        store.replace(path.relative_to(staged).as_posix(), path)


def _files_in(folder: Path) -> list[Path]:
    """The files of a model or of a part, sorted; not what a fetch keeps beside them."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not {LOCK, UNFINISHED} & {*path.relative_to(folder).parts})


def _sidecar(folder: str, model: str) -> dict[str, Any]:
    way_out = f"run: python -m jobs.stage_weights model={model} model.folder={folder}"
    where = join(folder, SIDECAR.format(model=model))
    try:
        sidecar = _read_sidecar(folder, model)
    except ValueError as error:
        raise UsageError(f"{where} must be readable JSON, got: {error}; {way_out}") from error
    if sidecar is None:
        raise NotStaged(f"model {model} must be staged, got no {where}; {way_out}")
    if changed := _changed(folder, sidecar["files"]):
        shown = ", ".join(changed[:5])
        raise UsageError(
            f"files of model {model} in {folder} must be those that were staged, changed or missing: {shown}; {way_out}"
        )
    return sidecar


def _read_sidecar(folder: str, model: str) -> dict[str, Any] | None:
    """What was staged, None if nothing was; ValueError if it cannot be understood."""
    where = join(folder, SIDECAR.format(model=model))
    if size_of(where) is None:
        return None
    with open_for_reading(where) as stream:
        sidecar: dict[str, Any] = json.loads(stream.read())
    return sidecar


def _changed(folder: str, files: Files) -> list[str]:
    """The names of files that are not there in their size."""
    return [name for name, facts in files.items() if size_of(join(folder, name)) != facts["size_bytes"]]
