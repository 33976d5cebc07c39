"""Sources of model files (a hub's repository, a bucket, a folder) and a copy of them that resumes and is checked.

All of them are file systems of fsspec; `hf://` is brought by huggingface_hub, which honours HF_ENDPOINT and HF_TOKEN.
A part appears under its name whole and checked or not at all: until then it grows in `.fetch/`, where a killed fetch
goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, StorageFull, StorageUnavailable, UsageError
from pipeline.storage.filesystem import FULL_DISK_ERRNOS, filesystem_of, storage_error
from pipeline.storage.models import UNFINISHED, alone_in

# Bytes asked for at once: large enough that neither a request's latency nor the hub's limit on requests counts, small
# enough to lose and to hold.
CHUNK_BYTES = 64 << 20
HUB = "hf://"
# Of no use to a loader, and edited long after the weights are published.
_IGNORED = (".gitattributes", ".md")

OnStart = Callable[[int, int], None]
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. `name` is relative to the source, empty if that is the file; hashes as far as known."""

    uri: str
    name: str
    size_bytes: int
    sha256: str | None = None
    # Git's hash, which the hub has for small files: sha1 of "blob <size>", a zero byte and the content.
    git_sha1: str | None = None


def list_source(uri: str) -> list[SourceFile]:
    """The files of a source, sorted. UsageError if there are none or they may not be read."""
    with _refusals(uri):
        fs, path = filesystem_of(uri)
        found = {path: fs.info(path)} if fs.isfile(path) else fs.find(path, detail=True)
        if not found:
            raise FileNotFoundError(uri)
        known = {} if uri.startswith(HUB) else _sidecar_hashes(fs, path)
        prefix = uri.removesuffix("/")
        files = []
        for full, info in sorted(found.items()):
            if info["type"] == "directory":
                continue
            name = "" if len(found) == 1 and full == path else full[len(path.rstrip("/")) + 1 :]
            lfs = info.get("lfs")
            files.append(
                SourceFile(
                    uri=f"{prefix}/{name}" if name else prefix,
                    name=name,
                    size_bytes=int(info["size"]),
                    sha256=lfs.sha256 if lfs else known.get(full),
                    git_sha1=None if lfs else info.get("blob_id"),
                )
            )
    return files


def repository_of(uri: str) -> str:
    """The repository of a source on the hub, with its revision; any other source is its own."""
    if not uri.startswith(HUB):
        return uri
    return HUB + "/".join(uri.removeprefix(HUB).split("/")[:2])


def fetch(folder: Path, wanted: Mapping[str, str], *, on_start: OnStart, on_bytes: OnBytes) -> dict[str, str]:
    """Copy the sources of `wanted` (path -> URI) that are not there yet, one process at a time.

    Paths are relative to `folder` unless absolute; what is fetched to an absolute one grows beside it. `on_start` is
    told the bytes in all and how many of them an earlier fetch left; `on_bytes` each number that came. Returns the
    sha256 of each fetched file by its path, relative where that of `wanted` is. Raises UsageError where a source is
    missing or closed to us, StorageFull before anything is fetched if a disk is too small, StorageUnavailable if the
    source fails or the bytes are not those that its hash says.
    """
    with ExitStack() as held:
        roots = {folder, *(_root(folder, path) for path in wanted if not (folder / path).exists())}
        for root in sorted(roots):  # in one order, so that no two wait for each other
            held.enter_context(_alone(root))
        lacking = {path: list_source(uri) for path, uri in wanted.items() if not (folder / path).exists()}
        lacking = {path: [f for f in files if not f.name.endswith(_IGNORED)] for path, files in lacking.items()}
        for files in lacking.values():
            _require_open(files[0])
        places = [(_unfinished(folder, path) / file.name, file) for path, files in lacking.items() for file in files]
        there = sum(min(_size(place), file.size_bytes) for place, file in places)
        _require_space(roots, places)
        if lacking:
            on_start(sum(file.size_bytes for _, file in places), there)
        hashes = {}
        for path, files in lacking.items():
            unfinished = _unfinished(folder, path)
            for file in files:
                relative = str(Path(path) / file.name)
                hashes[relative] = _fetch_file(file, unfinished / file.name, on_bytes)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            unfinished.rename(folder / path)
            with suppress(OSError):  # what another model's fetch left unfinished stays
                unfinished.parent.rmdir()
                (_root(folder, path) / UNFINISHED).rmdir()
    return hashes


def _root(folder: Path, path: str) -> Path:
    """Where the lock and the unfinished copy of `path` are: on the disk that it will lie on."""
    return Path(path).parent if Path(path).is_absolute() else folder


def _unfinished(folder: Path, path: str) -> Path:
    return _root(folder, path) / UNFINISHED / (Path(path).name if Path(path).is_absolute() else path)


def _fetch_file(file: SourceFile, place: Path, on_bytes: OnBytes) -> str:
    """Append what `place` lacks of `file`, check the whole, and return its sha256."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if _size(place) > file.size_bytes:
            place.unlink()
        sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        with place.open("a+b") as copy:
            copy.seek(0)
            while chunk := copy.read(CHUNK_BYTES):
                sha256.update(chunk)
                git_sha1.update(chunk)
            for chunk in _chunks(file, copy.tell()):
                copy.write(chunk)
                sha256.update(chunk)
                git_sha1.update(chunk)
                on_bytes(len(chunk))
            os.fsync(copy.fileno())
    except OSError as error:
        raise storage_error(error, f"writing {place}") from error
    expected = file.sha256 or file.git_sha1
    got = sha256.hexdigest() if file.sha256 or not file.git_sha1 else git_sha1.hexdigest()
    if expected is not None and got != expected:
        place.unlink()
        raise StorageUnavailable(
            f"{file.uri} must have the hash {expected} that its source names, got {got}; the copy is removed, run the "
            "same command again"
        )
    return sha256.hexdigest()


def _chunks(file: SourceFile, offset: int) -> Iterator[bytes]:
    """The bytes of `file` from `offset` on."""
    with _refusals(file.uri):
        fs, path = filesystem_of(file.uri)
        # Without a cache each read is one request of that size.
        stream: Any = fs.open(path, "rb", cache_type="none")
    with stream:
        while offset < file.size_bytes:
            with _refusals(file.uri):
                stream.seek(offset)
                chunk = stream.read(min(CHUNK_BYTES, file.size_bytes - offset))
                if not 0 < len(chunk) <= file.size_bytes - offset:
                    raise OSError(f"asked for bytes from {offset} of {file.size_bytes}, got {len(chunk)}")
            offset += len(chunk)
            yield chunk


def _require_open(file: SourceFile) -> None:
    """Refuse a file that may not be read now, not after an hour of fetching the others."""
    if file.size_bytes:
        with _refusals(file.uri):
            fs, path = filesystem_of(file.uri)
            with fs.open(path, "rb", cache_type="none") as stream:
                stream.read(1)


def _require_space(roots: Collection[Path], places: Iterable[tuple[Path, SourceFile]]) -> None:
    """StorageFull if what is still to come does not fit the disks of `roots`, each of which holds some of `places`."""
    by_disk = {root.stat().st_dev: root for root in roots}
    needed = dict.fromkeys(by_disk, 0)
    for place, file in places:
        root = next(root for root in roots if place.is_relative_to(root / UNFINISHED))
        needed[root.stat().st_dev] += max(file.size_bytes - _size(place), 0)
    for disk, root in by_disk.items():
        free = shutil.disk_usage(root).free
        if needed[disk] > free:
            raise StorageFull(
                f"{root} must have {needed[disk] / 1e9:.1f} GB free for the files to fetch, got {free / 1e9:.1f} GB; "
                "free space, or choose another disk with model.folder="
            )


def _sidecar_hashes(fs: Any, path: str) -> dict[str, str]:
    """Hashes of files in a bucket or folder that was staged, from the sidecars that lie beside `path`."""
    parent = path.rstrip("/").rpartition("/")[0]
    hashes: dict[str, str] = {}
    for sidecar in fs.glob(f"{parent}/fingerprint.*.json"):
        with fs.open(sidecar, "rb") as stream:
            files = json.loads(stream.read())["files"]
        hashes |= {f"{parent}/{name}": str(facts["sha256"]) for name, facts in files.items()}
    return hashes


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """`alone_in` the folder: of two processes that stage the same model, the second finds it there."""
    with ExitStack() as held:
        try:
            held.enter_context(alone_in(folder))
        except OSError as error:
            if error.errno in FULL_DISK_ERRNOS:
                raise storage_error(error, f"making {folder}") from error
            raise UsageError(
                f"model.folder must be writable to fetch into it, got {folder} ({error.strerror}); choose another with "
                "model.folder="
            ) from error
        yield


@contextmanager
def _refusals(uri: str) -> Iterator[None]:
    """Whatever the libraries behind fsspec raise becomes one line: closed, missing, or failing."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        status = _http_status(error)
        if status in (401, 403) or isinstance(error, PermissionError):
            page = repository_of(uri).removeprefix(HUB).partition("@")[0]
            licence = f"accept its licence on https://huggingface.co/{page} and set HF_TOKEN to a token of yours"
            way_out = licence if uri.startswith(HUB) else "check the credentials"
            raise UsageError(f"{uri} must be open to you, the server says no ({status or error}); {way_out}") from error
        if status == 404 or isinstance(error, (FileNotFoundError, ImportError, ValueError)):
            raise UsageError(
                f"{uri} must exist, got {type(error).__name__}: {str(error).splitlines()[0]}; correct model.sources"
            ) from error
        raise StorageUnavailable(
            f"fetching {uri} failed: {str(error).strip().splitlines()[0]}; run the same command again, it goes on "
            "where it was"
        ) from error


def _http_status(error: BaseException | None) -> int | None:
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
