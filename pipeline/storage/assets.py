"""The commit: clips, thumbnails and records under one output, and what is committed there already.

A clip counts when its record exists, and only then (README, "The contract"). Video and thumbnail get their final names
first, the record last, each created if absent, so any number of writers can race and a reader never sees a part.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.records.outcome import SKIPPED_COLUMNS
from pipeline.storage.store import Store

log = logging.getLogger("pipeline.storage")

# What a record must hold for its clip to count.
_RECORD_FIELDS = {"key", "run_id", "attempt", "uri", "thumbnail_uri", "sha256", "size_bytes"}
# Records are small and a bucket answers in tens of milliseconds: read many at once.
_READERS = 32
INDEX = "commits/index"
# A resume reads what no index holds one by one: at 50 ms and 32 readers, so many take 0.8 s.
INDEX_EVERY_RECORDS = 500
# Records in one index file, at most.
INDEX_FILE_RECORDS = 5_000
# Names of videos that are listed one page after the other: so many are ten pages of a bucket, half a second.
LISTED_TOGETHER = 10_000
# What a resume reads of an index file: a record's facts as JSON, without what no row that is there already shows, and
# where its video must be. No video where the record could not be read.
UNREADABLE = ""
_FACTS_SCHEMA = pa.schema(
    [("key", pa.string()), ("facts", pa.string()), ("video", pa.string()), ("size_bytes", pa.int64())]
)
_INDEX_SCHEMA = pa.schema([*_FACTS_SCHEMA, ("record", pa.string())])


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

    def committed(self, keys: Collection[str]) -> Mapping[str, dict[str, Any]]:
        """The records of those `keys` that are done: the record is there and so is its video, whole.

        Of a record only what a row that is there already shows (`SKIPPED_COLUMNS`). Listings, the compacted index, and
        one read for each done key that the index does not hold.
        """
        # Keys are random digits, so their first ones split the listing evenly.
        listed = self.store.sizes_by_prefix("commits", sorted({key[:1] for key in keys}))
        present = {name.removesuffix(".json") for name, _ in listed if name.endswith(".json")}
        wanted = {key: key for key in keys if key in present}
        del present
        found = CompactRecords(self.store)
        for table in self._index_tables():
            found.add(table, wanted)
        self._add_records(found, [key for key in wanted if key not in found], wanted)
        # An index file holds what a record said once; if it was removed and made anew since, its video may be there.
        doubtful = found.without(self._torn(found.videos()))
        self._add_records(found, doubtful, wanted)
        found.settle(found.without(self._torn(found.videos_of(doubtful))) if doubtful else ())
        return found

    def _add_records(self, found: CompactRecords, keys: Collection[str], wanted: Mapping[str, str]) -> None:
        """Add the records of `keys` as they are now, one read for each."""
        ordered = sorted(keys)
        for start in range(0, len(ordered), INDEX_FILE_RECORDS):
            texts = self._read_records(ordered[start : start + INDEX_FILE_RECORDS])
            found.add(_index_table(texts), wanted)

    def _torn(self, videos: dict[str, int]) -> Collection[str]:
        """Those of `videos` (name -> size in bytes) that are not there whole."""
        prefixes = list(name_prefixes(sorted(videos), LISTED_TOGETHER))
        for name, size in self.store.sizes_by_prefix("videos", prefixes):
            if videos.get(name) == size:
                del videos[name]
        return videos

    def compact(self, run_id: str) -> int:
        """Write the records that no index file holds into new ones; returns how many. Records stay the authority."""
        listed = self.store.sizes_by_prefix("commits", "0123456789abcdef")
        present = {name.removesuffix(".json") for name, _ in listed if name.endswith(".json")}
        for table in self._index_tables(("key",)):
            present.difference_update(table["key"].to_pylist())
        return self.index_records(run_id, present)

    def index_records(self, run_id: str, keys: Collection[str]) -> int:
        """Write the records of `keys` into new index files; returns how many."""
        ordered = sorted(keys)
        for start in range(0, len(ordered), INDEX_FILE_RECORDS):
            texts = self._read_records(ordered[start : start + INDEX_FILE_RECORDS])
            self._write_index(f"{INDEX}/{run_id}-{len(self.store.sizes(INDEX)):05d}.parquet", texts)
        return len(ordered)

    def _write_index(self, name: str, texts: Mapping[str, bytes]) -> None:
        sink = io.BytesIO()
        pq.write_table(_index_table(texts), sink, compression="zstd")
        self.store.write(name, sink.getvalue())

    def _index_tables(self, columns: Sequence[str] = _FACTS_SCHEMA.names) -> Iterator[pa.Table]:
        """These columns of every index file that can be read, later files last."""

        def read(name: str) -> pa.Table | None:
            try:
                file = pq.ParquetFile(io.BytesIO(self.store.read(f"{INDEX}/{name}") or b""))
                if set(columns) <= set(file.schema_arrow.names):
                    return file.read(list(columns))
                # Of a release that kept whole records only.
                old = file.read(["key", "record"])
                texts = zip(old["key"].to_pylist(), old["record"].to_pylist(), strict=True)
                return _index_table({key: text.encode() for key, text in texts}).select(list(columns))
            except (pa.ArrowException, OSError, KeyError):
                return None  # the records it was made of are still there

        names = sorted(self.store.sizes(INDEX))
        with ThreadPoolExecutor(_READERS) as pool:
            # No more at a time than wait for each other: whoever takes them holds one, the pool would hold all.
            for start in range(0, len(names), 2 * _READERS):
                tables = pool.map(read, names[start : start + 2 * _READERS])
                yield from (table for table in tables if table is not None)

    def _read_records(self, keys: Collection[str]) -> dict[str, bytes]:
        def read(key: str) -> tuple[str, bytes]:
            return key, self.store.read(f"commits/{key}.json") or b""

        with ThreadPoolExecutor(_READERS) as pool:
            return dict(pool.map(read, sorted(keys)))

    def _parsed(self, key: str, text: bytes) -> dict[str, Any] | None:
        record = _parsed(key, text)
        return None if record is None else _located(record, self.store.uri("videos"), self.store.uri("thumbnails"))

    def _publish(self, source: Path, name: str) -> Published:
        return self._facts(name, created=self.store.create(name, source))

    def _facts(self, name: str, *, created: bool) -> Published:
        """What lies under the name: read back in full, whoever put it there."""
        sha256, size_bytes = self.store.digest(name)
        return Published(name, self.store.uri(name), sha256, size_bytes, created)


class CompactRecords(Mapping[str, dict[str, Any]]):
    """Commit records by key, as the text that the index has of them: a dict is made of one when it is looked up.

    A million of them as dicts would take ten times the memory.
    """

    def __init__(self, store: Store) -> None:
        self._videos, self._thumbnails = store.uri("videos"), store.uri("thumbnails")
        self._tables: list[pa.Table] = []
        # Key -> which table, which row of it.
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, table: pa.Table, wanted: Mapping[str, str]) -> None:
        """Add the records of an index table whose keys are `wanted`, in the place of those that are here already.

        `wanted` maps each key to itself, as the caller holds it: a million keys need not be held twice.
        """
        table = table.select(_FACTS_SCHEMA.names)
        table = table.filter(pa.array([key in wanted for key in table["key"].to_pylist()], pa.bool_()))
        keys = [wanted[key] for key in table["key"].to_pylist()]
        self._places.update((key, (len(self._tables), row)) for row, key in enumerate(keys))
        self._tables.append(table.drop_columns("key").combine_chunks())

    def videos(self) -> dict[str, int]:
        """Name of each record's video -> its size in bytes."""
        sizes: dict[str, int] = {}
        for table in self._tables:
            sizes.update(zip(table["video"].to_pylist(), table["size_bytes"].to_pylist(), strict=True))
        sizes.pop(UNREADABLE, None)
        return sizes

    def videos_of(self, keys: Iterable[str]) -> dict[str, int]:
        """As `videos`, of a few keys."""
        places = [self._places[key] for key in keys]
        rows = [self._tables[number].slice(row, 1).to_pylist()[0] for number, row in places]
        return {row["video"]: row["size_bytes"] for row in rows if row["video"] != UNREADABLE}

    def without(self, torn: Collection[str]) -> list[str]:
        """The keys whose record could not be read, or whose video is one of `torn`."""
        lost = {UNREADABLE, *torn}
        rows = [[name in lost for name in table["video"].to_pylist()] for table in self._tables]
        return [key for key, (number, row) in self._places.items() if rows[number][row]]

    def settle(self, lost: Iterable[str]) -> None:
        """Forget the records of the keys `lost`; no more are added."""
        for key in lost:
            del self._places[key]
        self._tables = [table.select(["facts"]) for table in self._tables]

    def __getitem__(self, key: str) -> dict[str, Any]:
        number, row = self._places[key]
        record = json.loads(self._tables[number]["facts"][row].as_py())
        return _located(record, self._videos, self._thumbnails)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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

    def compact(self) -> None:
        """Write every record that no index holds, whoever committed it."""
        try:
            self._assets.compact(self._run_id)
        except PipelineError as error:
            log.warning("the index of commits was not compacted: %s", error)

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


def _parsed(key: str, text: bytes) -> dict[str, Any] | None:
    """The record of `key` as it was written; None if it cannot be read."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and record.get("key") == key and record.keys() >= _RECORD_FIELDS
    return record if is_record and isinstance(record["size_bytes"], int) else None


def _located(record: dict[str, Any], videos: str, thumbnails: str) -> dict[str, Any]:
    """The record with the URIs of its files in these two folders, as the output lies now."""
    # A clip's name is safe in a URI as it is (`records.work.file_stem`).
    record["uri"] = f"{videos}/{_name_of(record['uri'])}"
    record["thumbnail_uri"] = f"{thumbnails}/{_name_of(record['thumbnail_uri'])}"
    return record


def _index_table(texts: Mapping[str, bytes]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in _INDEX_SCHEMA.names}
    for key, text in texts.items():
        record = _parsed(key, text)
        facts, video, size_bytes = ("", UNREADABLE, 0) if record is None else _facts_of(record)
        row = (key, facts, video, size_bytes, text.decode(errors="replace"))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return pa.table(columns, _INDEX_SCHEMA)


def _facts_of(record: Mapping[str, Any]) -> tuple[str, str, int]:
    kept = {name: record[name] for name in SKIPPED_COLUMNS if name in record}
    # Where the output lies is said when they are looked up.
    kept |= {name: _name_of(record[name]) for name in ("uri", "thumbnail_uri")}
    facts = json.dumps(kept, separators=(",", ":"))
    return facts, kept["uri"], record["size_bytes"]


def name_prefixes(names: Sequence[str], most: int) -> Iterator[str]:
    """Prefixes that together cover the sorted, distinct `names`, each of them at most `most`."""
    if not names:
        return
    pairs = zip(names[0], names[-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if len(names) <= most:
        yield names[0][:shared]
        return
    for _, group in groupby(names, key=lambda name: name[: shared + 1]):
        yield from name_prefixes(list(group), most)
