"""The commit: clips, thumbnails and records under one output, and what is committed there already.

A clip counts when its record exists, and only then (README, "The contract"). Video and thumbnail get their final names
first, the record last, each created if absent, so any number of writers can race and a reader never sees a part.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.storage.store import Store

log = logging.getLogger("pipeline.storage")

# What a record must hold for its clip to count.
_RECORD_FIELDS = {"key", "run_id", "attempt", "uri", "thumbnail_uri", "sha256", "size_bytes"}
# Records are small and a bucket answers in tens of milliseconds: read many at once.
_READERS = 16
INDEX = "commits/index"
# A resume reads what no index holds one by one: at 50 ms and 16 readers, so many take 1.6 s.
INDEX_EVERY_RECORDS = 500
_INDEX_SCHEMA = pa.schema([("key", pa.string()), ("record", pa.string())])


@dataclass(frozen=True)
class Published:
    """A file under its final name. `created` is False if that name was taken; the hash is that of the file there."""

    name: str
    uri: str
    sha256: str
    size_bytes: int
    created: bool


@dataclass(frozen=True)
class AssetStore:
    """The committed part of one output. Safe for many workers and several drivers at once."""

    store: Store

    def publish_video(self, source: Path, file_stem: str) -> Published:
        return self._publish(source, f"videos/{file_stem}.mp4")

    def publish_thumbnail(self, source: Path, file_stem: str) -> Published:
        return self._publish(source, f"thumbnails/{file_stem}.jpg")

    def fetch(self, published: Published, target: Path) -> None:
        self.store.fetch(published.name, target)

    def replace(self, published: Published, source: Path) -> Published:
        """Put `source` in the place of a published file that turned out to be broken."""
        self.store.replace(published.name, source)
        return self._facts(published.name, created=True)

    def discard(self, published: Published) -> None:
        """Remove a file that this writer created and that no record will name."""
        if published.created:
            self.store.delete(published.name)

    def commit(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Create the commit record of `key` if there is none; returns the record that stands, ours or the winner's.

        A record that cannot be read, or whose video is gone or is no longer the one it names, is replaced: neither
        says where a whole clip is.
        """
        name = f"commits/{key}.json"
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1).encode()
        if self.store.create(name, content):
            return dict(record)
        winner = self.record(key)
        if winner is not None and self._stands(winner, record):
            return winner
        torn = self.store.read(name)
        if winner is None and torn is not None:
            self.store.write(f"commits/{key}.unreadable", torn)
        self.store.write(name, content)
        # `~` sorts behind every run: this entry wins over one of the record that was replaced.
        self._write_index(f"{INDEX}/~{key[:12]}.parquet", {key: content})
        return dict(record)

    def _stands(self, winner: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
        """If the winner's video is there: by its hash if it is the file that ours names too, else by its size."""
        if winner["uri"] == ours["uri"]:
            return bool(winner["sha256"] == ours["sha256"])
        return self._is_whole(winner)

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        return bool(self.store.size(f"videos/{_name_of(record['uri'])}") == record["size_bytes"])

    def standing(self, key: str) -> dict[str, Any] | None:
        """The record of one `key` if it is done, as `committed` says, without listing what else is there."""
        record = self.record(key)
        return record if record is not None and self._is_whole(record) else None

    def record(self, key: str) -> dict[str, Any] | None:
        """The commit record of `key`, its URIs as the output lies now; None if there is none that can be read."""
        return self._parsed(key, self.store.read(f"commits/{key}.json") or b"")

    def committed(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of those `keys` that are done: the record is there and so is its video, whole.

        Two listings, the compacted index, and one read for each done key that the index does not hold.
        """
        present = self._present()
        sizes = self.store.sizes("videos")
        wanted = set(keys) & present
        index = self._index()
        texts = {key: index[key] for key in wanted if key in index}
        texts |= self._read_records(wanted - texts.keys())
        done = {}
        for key, text in texts.items():
            record = self._parsed(key, text)
            if record is not None and sizes.get(_name_of(record["uri"])) == record["size_bytes"]:
                done[key] = record
        return done

    def compact(self, run_id: str) -> int:
        """Write the records that no index file holds into a new one; returns how many. Records stay the authority."""
        return self.index_records(run_id, self._present() - self._index().keys())

    def index_records(self, run_id: str, keys: Collection[str]) -> int:
        """Write the records of `keys` into a new index file; returns how many."""
        texts = self._read_records(keys)
        if texts:
            self._write_index(f"{INDEX}/{run_id}-{len(self.store.sizes(INDEX)):05d}.parquet", texts)
        return len(texts)

    def _write_index(self, name: str, texts: Mapping[str, bytes]) -> None:
        columns = {"key": list(texts), "record": [text.decode(errors="replace") for text in texts.values()]}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, _INDEX_SCHEMA), sink, compression="zstd")
        self.store.write(name, sink.getvalue())

    def _present(self) -> set[str]:
        return {name.removesuffix(".json") for name in self.store.sizes("commits") if name.endswith(".json")}

    def _index(self) -> dict[str, bytes]:
        """Key -> the record's text, of every index file that can be read; later files win."""
        index: dict[str, bytes] = {}
        for name in sorted(self.store.sizes(INDEX)):
            try:
                table = pq.read_table(io.BytesIO(self.store.read(f"{INDEX}/{name}") or b""))
                index.update(
                    (key, text.encode())
                    for key, text in zip(table["key"].to_pylist(), table["record"].to_pylist(), strict=True)
                )
            except (pa.ArrowException, OSError, KeyError):
                continue  # the records it was made of are still there
        return index

    def _read_records(self, keys: Collection[str]) -> dict[str, bytes]:
        def read(key: str) -> tuple[str, bytes]:
            return key, self.store.read(f"commits/{key}.json") or b""

        with ThreadPoolExecutor(_READERS) as pool:
            return dict(pool.map(read, sorted(keys)))

    def _parsed(self, key: str, text: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(text)
        except ValueError:
            return None
        if not isinstance(record, dict) or record.get("key") != key or not record.keys() >= _RECORD_FIELDS:
            return None
        for name, folder in (("uri", "videos"), ("thumbnail_uri", "thumbnails")):
            record[name] = self.store.uri(f"{folder}/{_name_of(record[name])}")
        return record

    def _publish(self, source: Path, name: str) -> Published:
        return self._facts(name, created=self.store.create(name, source))

    def _facts(self, name: str, *, created: bool) -> Published:
        """What lies under the name: read back in full, whoever put it there."""
        sha256, size_bytes = self.store.digest(name)
        return Published(name, self.store.uri(name), sha256, size_bytes, created)


class RunningIndex:
    """Compacts what a run commits while it runs, on a thread of its own, so that a killed run leaves few single ones.

    A failure is logged and costs nothing: whoever compacts next finds the records that no index holds.
    """

    def __init__(self, assets: AssetStore, run_id: str, *, every: int = INDEX_EVERY_RECORDS) -> None:
        self._assets = assets
        self._run_id = run_id
        self._every = every
        self._keys: list[str] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="commit-index")

    def note(self, key: str) -> None:
        """`key` was committed."""
        self._keys.append(key)
        if len(self._keys) >= self._every:
            self._writer.submit(self._write, self._keys)
            self._keys = []

    def close(self, *, wait: bool) -> None:
        """No more keys come. Without `wait` what is being written is given up."""
        self._writer.shutdown(wait=wait, cancel_futures=not wait)

    def _write(self, keys: list[str]) -> None:
        try:
            self._assets.index_records(self._run_id, keys)
        except PipelineError as error:
            log.warning("the index of commits was not written: %s", error)


def _name_of(uri: str) -> str:
    return unquote(uri.rpartition("/")[2])
