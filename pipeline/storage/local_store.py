"""A store on a disk: exclusive by hard links, whole by renames, durable by syncing.

fsspec is not used here: its local `mode="create"` overwrites silently and its transactions are not atomic across
devices (both measured).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pipeline.errors import UsageError
from pipeline.storage.filesystem import FULL_DISK_ERRNOS, storage_error, write_synced
from pipeline.storage.patience import QUICK, MayPass, Patience, keep_trying
from pipeline.storage.processes import writer, writer_is_gone

T = TypeVar("T")
# Errors of linking that mean "this disk cannot", after which a copy stands in.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# What a disk behind a network says while it is away.
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EAGAIN)


class LocalStore:
    """A folder on a disk."""

    def __init__(self, root: Path, *, patience: Patience = QUICK, is_exclusive: bool = True) -> None:
        self.is_exclusive = is_exclusive
        self._root = root
        self._patience = patience

    def with_patience(self, patience: Patience) -> LocalStore:
        return LocalStore(self._root, patience=patience, is_exclusive=self.is_exclusive)

    @property
    def root_uri(self) -> str:
        return self._root.as_uri()

    def uri(self, name: str) -> str:
        return (self._root / name).as_uri()

    def shown(self, name: str) -> str:
        return str(self._root / name)

    def prepare(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self.is_exclusive = self._can_link()
        except OSError as error:
            if error.errno in FULL_DISK_ERRNOS:
                raise storage_error(error, f"preparing {self._root}") from error
            reason = error.strerror or error
            raise UsageError(f"output must be writable, got {self._root}: {reason}; choose another output=") from error

    def sweep(self, before_ns: int) -> None:
        """Remove what killed writers left half-written: at once where their end can be seen, else by its age."""
        folder = self._root / "_attempts"
        for path in folder.glob(".*"):
            with suppress(OSError):
                if path.stat().st_mtime_ns < before_ns or writer_is_gone(path.name.removeprefix(".")):
                    path.unlink()
        # A folder that is not empty stays: another run has attempts there.
        for path in (*(folder / name for name in self.folders("_attempts")), folder):
            with suppress(OSError):
                path.rmdir()

    def read(self, name: str) -> bytes | None:
        return self._try("reading", name, lambda path: _unless_absent(path.read_bytes))

    def size(self, name: str) -> int | None:
        return self._try("looking at", name, lambda path: _unless_absent(lambda: path.stat().st_size))

    def write(self, name: str, content: bytes) -> None:
        def put(path: Path) -> None:
            temporary = self._temporary(content)
            try:
                _in_its_folder(path, lambda: temporary.replace(path))
            finally:
                temporary.unlink(missing_ok=True)

        self._try("writing", name, put)

    def create(self, name: str, content: bytes | Path) -> bool:
        """A hard link is the one local operation that is both exclusive and never shows a partial file."""

        def put(path: Path) -> bool:
            if isinstance(content, Path) and self.is_exclusive:
                try:
                    return self._link(content, path)
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
            temporary = self._temporary(content.read_bytes() if isinstance(content, Path) else content)
            try:
                if self.is_exclusive:
                    return self._link(temporary, path)
                if path.exists():
                    return False
                _in_its_folder(path, lambda: temporary.replace(path))
                return True
            finally:
                temporary.unlink(missing_ok=True)

        return self._try("writing", name, put)

    def replace(self, name: str, source: Path) -> None:
        self.write(name, source.read_bytes())

    def fetch(self, name: str, target: Path) -> None:
        self._try("reading", name, lambda path: shutil.copyfile(path, target))

    def digest(self, name: str) -> tuple[str, int]:
        def read(path: Path) -> tuple[str, int]:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()

        return self._try("reading back", name, read)

    def sizes(self, folder: str) -> dict[str, int]:
        return self._listed(
            folder, lambda entries: {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        )

    def sizes_by_prefix(self, folder: str, prefixes: Sequence[str]) -> Iterator[tuple[str, int]]:
        return iter(self.sizes(folder).items())

    def folders(self, folder: str) -> list[str]:
        return self._listed(folder, lambda entries: sorted(entry.name for entry in entries if entry.is_dir()))

    def delete(self, name: str) -> None:
        self._try("deleting", name, lambda path: path.unlink(missing_ok=True))

    def delete_folder(self, folder: str) -> None:
        path = self._root / folder
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # others still have something there
            path.parent.rmdir()

    def append(self, name: str, line: str) -> bool:
        def add(path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line)

        self._try("writing", name, add)
        return True

    def scratch(self, run_id: str) -> Path:
        name = f"_attempts/{run_id}"
        self._try("making", name, lambda path: path.mkdir(parents=True, exist_ok=True))
        return self._root / name

    def _try(self, doing: str, name: str, call: Callable[[Path], T]) -> T:
        """Call until it succeeds or `patience` ends; only what a network disk says while it is away may pass."""
        path = self._root / name

        def attempt() -> T:
            try:
                return call(path)
            except OSError as error:
                if error.errno in _AWAY:
                    raise MayPass(str(error)) from error
                raise storage_error(error, f"{doing} {path}") from error

        return keep_trying(attempt, self._patience, f"{doing} {path}")

    def _listed(self, folder: str, collect: Callable[[Iterator[os.DirEntry[str]]], T]) -> T:
        """What `collect` makes of the entries of a folder, which may be many; of none if there is no such folder."""

        def scan(path: Path) -> T:
            try:
                with os.scandir(path) as entries:
                    return collect(entry for entry in entries if not entry.name.startswith(".") and _exists(entry))
            except PermissionError as error:
                raise UsageError(
                    f"output must be readable, got {path}: {error.strerror}; choose another output="
                ) from error

        listed = self._try("listing", folder, lambda path: _unless_absent(lambda: scan(path)))
        return collect(iter(())) if listed is None else listed

    def _temporary(self, content: bytes) -> Path:
        """A synced file of `content` on this disk, in `_attempts`, where whatever a kill leaves is swept."""
        path = self._root / "_attempts" / f".{writer()}-{uuid.uuid4().hex[:12]}"
        try:
            _in_its_folder(path, lambda: write_synced(path, content))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _can_link(self) -> bool:
        """If this disk has hard links; without them (exFAT, mounted buckets) nothing on it is exclusive."""
        probe = self._temporary(b"x")
        other = probe.with_name(f"{probe.name}.link")
        try:
            os.link(probe, other)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return False
        finally:
            probe.unlink()
            other.unlink(missing_ok=True)
        return True

    @staticmethod
    def _link(source: Path, path: Path) -> bool:
        try:
            _in_its_folder(path, lambda: os.link(source, path))
        except FileExistsError:
            # Over a network the acknowledgement of a link may be lost; sent again, it finds itself.
            return path.samefile(source)
        # Make the name survive a power cut: it lives in the folder, not in the file.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True


def _in_its_folder(path: Path, make: Callable[[], object]) -> None:
    """Make `path` in a folder that another run removes as often as it finds it empty."""
    for last in (False, False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            make()
            return
        except FileNotFoundError:
            if last:
                raise


def _unless_absent(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _exists(entry: os.DirEntry[str]) -> bool:
    """False for what vanished after it was listed, and for a dangling link."""
    try:
        entry.stat()
    except OSError:
        return False
    return True
