"""Inputs by URI: finding and opening files on any fsspec store; and small local files. Foreign errors become ours.

Outputs are written through `store.py`.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import fsspec

from pipeline.errors import PipelineError, StorageFull, StorageUnavailable, UsageError
from pipeline.storage.clients import ANSWER_TIMEOUT_S, client_of

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# An unfinished write older than this belongs to nobody: a clip is uploaded in minutes at most.
ABANDONED_AFTER_S = 3600.0
# Inputs are mostly looked at before anything starts: a silent endpoint is said within a minute.
INPUT_TRIES = 2
INPUT_ANSWER_TIMEOUT_S = ANSWER_TIMEOUT_S


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI; a plain path is taken as it is, relative to the working directory."""
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    return Path(os.path.abspath(Path(uri).expanduser()))  # noqa: PTH100 - resolves `..`, which absolute() keeps


def join(folder: str, name: str) -> str:
    """A file's URI from its name relative to `folder`; an absolute path and a URI stay as they are."""
    return name if "://" in name or name.startswith("/") else f"{folder.rstrip('/')}/{name}"


def storage_error(error: OSError, doing: str) -> PipelineError:
    """Our error for an operating system's: a full disk, or a store that may recover."""
    if error.errno in FULL_DISK_ERRNOS:
        return StorageFull(f"disk full while {doing}: {error.strerror}; free space, then run the same command again")
    return StorageUnavailable(f"storage failed while {doing}: {error}; run the same command again when it is back")


def expand(uri: str, *, suffix: str, what: str) -> list[str]:
    """The files that `uri` (a file, a folder, or a glob) means, sorted by path; UsageError if there are none.

    Inside a folder, names that begin with `_` or `.` are skipped, as readers of Parquet data sets do.
    """
    try:
        fs, path = filesystem_of(uri)
        if glob.has_magic(path) and not fs.exists(path):
            fixed = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
            found = [str(p) for p in fs.glob(path) if str(p).endswith(suffix) and not _is_hidden(str(p)[len(fixed) :])]
        elif fs.isdir(path):
            found = [p for p in fs.find(path) if p.endswith(suffix) and not _is_hidden(p[len(path) :])]
        elif fs.exists(path):
            found = [path]
        else:
            raise UsageError(f"{what} must exist, got {uri!r}; check the path")
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what} must be readable, got {uri!r}: {error}; check path and permissions") from error
    if not found:
        raise UsageError(f"{what} must hold at least one {suffix} file, got {uri!r}; check the path")
    return sorted(found) if is_local(uri) else [fs.unstrip_protocol(p) for p in sorted(found)]


def filesystem_of(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path in it.

    A local path goes straight to the local one: `::` in it would mean a chain to fsspec, and a file URI is
    percent-encoded, which fsspec does not undo.
    """
    if is_local(uri):
        return fsspec.filesystem("file"), str(local_path(uri))
    return client_of(uri, tries=INPUT_TRIES, answer_timeout_s=INPUT_ANSWER_TIMEOUT_S)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.strip("/").split("/"))


@contextmanager
def open_for_reading(uri: str) -> Iterator[IO[bytes]]:
    """Open `uri` for reading bytes; UsageError if that is not possible."""
    try:
        fs, path = filesystem_of(uri)
        stream: Any = fs.open(path, "rb")
    except Exception as error:
        raise UsageError(f"{uri} must be readable, got: {error}; check the path and its permissions") from error
    with stream:
        yield stream


def size_of(uri: str) -> int | None:
    """Size in bytes of a file, or None if there is none; UsageError if the place cannot be looked at."""
    fs, path = filesystem_of(uri)
    try:
        return int(fs.size(path))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise UsageError(f"{uri} must be readable, got: {error}; check the path and the credentials") from error


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns; an OSError may leave a part."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old bytes or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    try:
        try:
            write_synced(temporary, content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error


def sha256_of(path: Path) -> str:
    """Hash of a local file; our storage error if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(error, f"reading {path}") from error
