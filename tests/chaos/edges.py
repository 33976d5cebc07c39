"""The edges of a run's state machine: the moments before and after each operation on its store, counted and named.

A process killed at an edge has done the operation entirely or not at all, which is what a machine's end looks like
from the store.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.storage.store import Store, open_store

# What changes the store; reads leave nothing behind to go wrong.
CHANGES = ("create", "write", "replace", "append", "delete", "delete_folder", "scratch", "prepare", "sweep")


class Edges:
    """Counts edges over all stores it opens. `kill_at` ("2 before create run.json") ends the process at the second
    one of that name; `listing` is a file that gets the name of each."""

    def __init__(self, kill_at: str | None, listing: str | None) -> None:
        number, _, name = (kill_at or "0 none").partition(" ")
        self._kill_at = (int(number), name)
        self._listing = None if listing is None else Path(listing)
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def open(self, uri: str, **settings: Any) -> Store:
        return _Watched(open_store(uri, **settings), self)  # type: ignore[return-value]

    def passed(self, side: str, operation: str, name: str) -> None:
        edge = f"{side} {operation} {kind_of(name)}".rstrip()
        with self._lock:
            self._passed[edge] += 1
            if (self._passed[edge], edge) == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._listing is not None:
                with self._listing.open("a") as stream:
                    stream.write(f"{edge}\n")


class _Watched:
    """A store that tells of each change, before and after."""

    def __init__(self, store: Store, edges: Edges) -> None:
        self._store = store
        self._edges = edges

    def __getattr__(self, operation: str) -> Any:
        attribute = getattr(self._store, operation)
        if operation == "with_patience":
            return lambda patience: _Watched(attribute(patience), self._edges)
        if operation not in CHANGES:
            return attribute

        def watched(*arguments: Any) -> Any:
            # `prepare` and `sweep` are of the whole store.
            name = arguments[0] if arguments and isinstance(arguments[0], str) else ""
            self._edges.passed("before", operation, name)
            result = attribute(*arguments)
            self._edges.passed("after", operation, name)
            return result

        return watched


def kind_of(name: str) -> str:
    """A file's name without what differs from row to row and run to run."""
    name = re.sub(r"[0-9a-f]{64}", "<key>", name)
    name = re.sub(r"(videos|thumbnails)/.*\.(\w+)$", r"\1/<clip>.\2", name)
    name = re.sub(r"\d{8}T\d{6}-[0-9a-f]{6}", "<run>", name)
    name = re.sub(r"[0-9a-f]{12}\.parquet", "<key12>.parquet", name)
    return re.sub(r"\d{5}", "<n>", name)
