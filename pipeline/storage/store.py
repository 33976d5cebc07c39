"""One output, wherever it lies: what every store offers, and how to open the one at a URI.

All stores offer the same few operations on names relative to their root. Two of them carry the commit protocol:
`create` is exclusive (create if absent) and `write` replaces whole; neither ever shows a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import UsageError
from pipeline.storage.clients import ANSWER_TIMEOUT_S
from pipeline.storage.filesystem import is_local, local_path
from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.patience import QUICK, Patience


class Store(Protocol):
    """Files under one root. Names are relative and use `/`; every method raises our own storage errors."""

    # If `create` is exclusive among any number of writers. Found out by `prepare`; where it is not, `create` looks and
    # then writes, and `committer.py` keeps all but one driver out.
    is_exclusive: bool

    @property
    def root_uri(self) -> str: ...

    def with_patience(self, patience: Patience) -> Store:
        """The same store, whose operations go on failing for so long before they raise StorageUnavailable."""
        ...

    def uri(self, name: str) -> str: ...

    def shown(self, name: str) -> str:
        """The file as a person would name it on a command line."""
        ...

    def prepare(self) -> None:
        """Prove that the root can be written, UsageError if not, and find out if `create` is exclusive there."""
        ...

    def sweep(self, before_ns: int) -> None:
        """Remove what writers left half-written that are gone, or that began before `before_ns` (UTC)."""
        ...

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None if it is absent."""
        ...

    def size(self, name: str) -> int | None:
        """Size in bytes of a file, or None if it is absent."""
        ...

    def write(self, name: str, content: bytes) -> None: ...

    def create(self, name: str, content: bytes | Path) -> bool:
        """Create the file if it is absent; says if the file there is now this one. A `Path` is a finished local file,
        which stays.

        A put whose acknowledgement was lost is recognised by its content: of writers that create the same bytes, each
        may be told that it did. Where it matters who won, the content names its writer.
        """
        ...

    def replace(self, name: str, source: Path) -> None: ...

    def fetch(self, name: str, target: Path) -> None: ...

    def digest(self, name: str) -> tuple[str, int]:
        """sha256 (hex) and size in bytes of a file, read back in full."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Names of the files directly in `folder` -> sizes in bytes; empty if there is none."""
        ...

    def sizes_by_prefix(self, folder: str, prefixes: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Names and sizes in bytes of the files directly in `folder` that begin with any of `prefixes`.

        For folders that take a bucket many pages to list: the prefixes are listed at the same time. A store that gives
        a folder at once gives the others too.
        """
        ...

    def folders(self, folder: str) -> list[str]: ...

    def delete(self, name: str) -> None: ...

    def delete_folder(self, folder: str) -> None: ...

    def append(self, name: str, line: str) -> bool:
        """Append a line at once, if the store can; else the caller keeps it and writes the file whole."""
        ...

    def scratch(self, run_id: str) -> Path:
        """A local folder for unfinished files of a run, on the output's own disk if it has one."""
        ...


def open_store(
    uri: str,
    *,
    patience: Patience = QUICK,
    answer_timeout_s: float = ANSWER_TIMEOUT_S,
    is_exclusive: bool = True,
) -> Store:
    """The store at `uri`: a path, or any URI that fsspec knows.

    `is_exclusive` is for a process that does not call `prepare`: what it found in the one that did.
    """
    if is_local(uri):
        return LocalStore(local_path(uri), patience=patience, is_exclusive=is_exclusive)
    try:
        return ObjectStore(uri, patience=patience, answer_timeout_s=answer_timeout_s, is_exclusive=is_exclusive)
    except (ImportError, ValueError) as error:
        raise UsageError(f"output must be a path or a URI that fsspec knows, got {uri!r}: {error}") from error
