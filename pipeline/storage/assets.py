"""The commit: clips, thumbnails and records under one output, and what is committed there already.

A clip counts when its record exists, and only then (README, "The contract"). Video and thumbnail get their final names
first, the record last, each created if absent, so any number of writers can race and a reader never sees a part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UsageError
from pipeline.storage.filesystem import create_bytes_if_absent, create_if_absent, storage_error, write_atomically

# What a record must hold for its clip to count.
_RECORD_FIELDS = {"key", "run_id", "attempt", "uri", "thumbnail_uri", "sha256", "size_bytes"}


@dataclass(frozen=True)
class Published:
    """A file under its final name. `created` is False if that name was taken; the hash is that of the file there."""

    uri: str
    path: Path
    sha256: str
    size_bytes: int
    created: bool


@dataclass(frozen=True)
class AssetStore:
    """The committed part of one output folder. Safe for many workers and several drivers at once."""

    root: Path

    def attempt_folder(self, run_id: str) -> Path:
        return self.root / "_attempts" / run_id

    def publish_video(self, source: Path, file_stem: str) -> Published:
        return self._publish(source, self.root / "videos" / f"{file_stem}.mp4")

    def publish_thumbnail(self, source: Path, file_stem: str) -> Published:
        return self._publish(source, self.root / "thumbnails" / f"{file_stem}.jpg")

    def replace(self, published: Published, source: Path) -> Published:
        """Put `source` in the place of a published file that turned out to be broken; needs one device."""
        try:
            source.replace(published.path)
        except OSError as error:
            raise storage_error(error, f"replacing {published.path}") from error
        return _facts(published.path, created=True)

    def discard(self, published: Published) -> None:
        """Remove a file that this writer created and that no record will name."""
        if published.created:
            published.path.unlink(missing_ok=True)

    def commit(self, key: str, record: Mapping[str, Any], *, scratch: Path) -> dict[str, Any]:
        """Create the commit record of `key` if there is none; returns the record that stands, ours or the winner's.

        A record that cannot be read is moved aside, and one whose video is gone or is no longer the one it names is
        replaced: neither says where a whole clip is.
        """
        path = self.record_path(key)
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1).encode()
        while not create_bytes_if_absent(path, content, scratch=scratch):
            winner = self.record(key)
            if winner is None:
                with suppress(FileNotFoundError):
                    path.replace(path.with_suffix(".unreadable"))
            elif self._stands(winner, record):
                return winner
            else:
                write_atomically(path, content)
                break
        return dict(record)

    def _stands(self, winner: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
        """If the winner's video is there: by its hash if it is the file that ours names too, else by its size."""
        if winner["uri"] == ours["uri"]:
            return bool(winner["sha256"] == ours["sha256"])
        video = self.root / "videos" / _name_of(winner["uri"])
        return video.is_file() and video.stat().st_size == winner["size_bytes"]

    def record_path(self, key: str) -> Path:
        return self.root / "commits" / f"{key}.json"

    def record(self, key: str) -> dict[str, Any] | None:
        """The commit record of `key`, its URIs as the output lies now; None if there is none that can be read."""
        try:
            record = json.loads(self.record_path(key).read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("key") != key or not record.keys() >= _RECORD_FIELDS:
            return None
        for name, folder in (("uri", "videos"), ("thumbnail_uri", "thumbnails")):
            record[name] = (self.root / folder / _name_of(record[name])).as_uri()
        return record

    def committed(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of those `keys` that are done: the record is there and so is its video, whole.

        Two listings and one read for each done key; a key that is not done costs nothing.
        """
        present = {name.removesuffix(".json") for name in _sizes(self.root / "commits") if name.endswith(".json")}
        sizes = _sizes(self.root / "videos")
        done = {}
        for key in set(keys) & present:
            record = self.record(key)
            if record is not None and sizes.get(_name_of(record["uri"])) == record["size_bytes"]:
                done[key] = record
        return done

    def _publish(self, source: Path, target: Path) -> Published:
        created = create_if_absent(target, source)
        return _facts(target, created=created)


def _facts(path: Path, *, created: bool) -> Published:
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Published(path.as_uri(), path, digest, path.stat().st_size, created)
    except OSError as error:
        raise storage_error(error, f"reading back {path}") from error


def _name_of(uri: str) -> str:
    return unquote(uri.rpartition("/")[2])


def _sizes(folder: Path) -> dict[str, int]:
    """File name -> size in bytes; empty if there is no such folder. Files that vanish meanwhile are left out."""
    sizes: dict[str, int] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    sizes[entry.name] = entry.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        raise UsageError(f"output must be readable, got {folder}: {error.strerror}; choose another output=") from error
    except OSError as error:
        raise storage_error(error, f"listing {folder}") from error
    return sizes
