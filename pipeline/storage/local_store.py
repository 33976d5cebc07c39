"""A store on a disk: exclusive by hard links, whole by renames, durable by syncing.

fsspec is not used here: its local `mode="create"` overwrites silently and its transactions are not atomic across
devices (both measured).
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage.filesystem import ABANDONED_AFTER_S, FULL_DISK_ERRNOS, sha256_of, storage_error, write_synced
from pipeline.storage.processes import writer, writer_is_gone

# Errors of linking that mean "this disk cannot", after which a copy stands in.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


class LocalStore:
    """A folder on a disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

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
            self._temporary(b"x").unlink()
            self._sweep()
            with suppress(OSError):  # another run has attempts there
                (self._root / "_attempts").rmdir()
        except OSError as error:
            if error.errno in FULL_DISK_ERRNOS:
                raise storage_error(error, f"preparing {self._root}") from error
            reason = error.strerror or error
            raise UsageError(f"output must be writable, got {self._root}: {reason}; choose another output=") from error

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error(error, f"reading {self._root / name}") from error

    def size(self, name: str) -> int | None:
        try:
            return (self._root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error(error, f"looking at {self._root / name}") from error

    def write(self, name: str, content: bytes) -> None:
        path = self._root / name
        try:
            temporary = self._temporary(content)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, f"writing {path}") from error

    def create(self, name: str, content: bytes | Path) -> bool:
        """A hard link is the one local operation that is both exclusive and never shows a partial file."""
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                try:
                    return self._link(content, path)
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
                    content = content.read_bytes()
            temporary = self._temporary(content)
            try:
                return self._link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, f"writing {path}") from error

    def replace(self, name: str, source: Path) -> None:
        self.write(name, source.read_bytes())

    def fetch(self, name: str, target: Path) -> None:
        try:
            shutil.copyfile(self._root / name, target)
        except OSError as error:
            raise storage_error(error, f"reading {self._root / name}") from error

    def digest(self, name: str) -> tuple[str, int]:
        path = self._root / name
        return sha256_of(path), path.stat().st_size

    def sizes(self, folder: str) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in self._entries(folder) if entry.is_file()}

    def sizes_by_prefix(self, folder: str, prefixes: Sequence[str]) -> Iterator[tuple[str, int]]:
        return ((entry.name, entry.stat().st_size) for entry in self._entries(folder) if entry.is_file())

    def folders(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._entries(folder) if entry.is_dir())

    def delete(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        path = self._root / folder
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # others still have something there
            path.parent.rmdir()

    def append(self, name: str, line: str) -> bool:
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise storage_error(error, f"writing {path}") from error
        return True

    def scratch(self, run_id: str) -> Path:
        folder = self._root / "_attempts" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._root / folder) as entries:
                yield from (entry for entry in entries if not entry.name.startswith(".") and _exists(entry))
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError as error:
            path = self._root / folder
            raise UsageError(
                f"output must be readable, got {path}: {error.strerror}; choose another output="
            ) from error
        except OSError as error:
            raise storage_error(error, f"listing {self._root / folder}") from error

    def _temporary(self, content: bytes) -> Path:
        """A synced file of `content` on this disk, in `_attempts`, where whatever a kill leaves is swept."""
        folder = self._root / "_attempts"
        path = folder / f".{writer()}-{uuid.uuid4().hex[:12]}"
        for last in (False, False, True):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                write_synced(path, content)
                break
            except FileNotFoundError:  # another run has just removed the folder, which it found empty
                if last:
                    raise
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return path

    def _sweep(self) -> None:
        """Remove what killed writers left half-written: at once where their end can be seen, else when it is old."""
        for path in (self._root / "_attempts").glob(".*"):
            with suppress(OSError):
                old = time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
                if old or writer_is_gone(path.name.removeprefix(".")):
                    path.unlink()

    @staticmethod
    def _link(source: Path, path: Path) -> bool:
        try:
            os.link(source, path)
        except FileExistsError:
            return False
        # Make the name survive a power cut: it lives in the folder, not in the file.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True


def _exists(entry: os.DirEntry[str]) -> bool:
    """False for what vanished after it was listed, and for a dangling link."""
    try:
        entry.stat()
    except OSError:
        return False
    return True
