"""The commit: clips, thumbnails and records under one output, and what is committed there already.

A clip counts when its record exists, and only then (README, "The contract"). Video and thumbnail get their final names
first, the record last, each created if absent, so any number of writers can race and a reader never sees a part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StorageUnavailable
from pipeline.storage.filesystem import create_bytes_if_absent, create_if_absent, storage_error


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

    def commit(self, key: str, record: Mapping[str, Any], *, scratch: Path) -> dict[str, Any]:
        """Create the commit record of `key` if there is none; returns the record that stands, ours or the winner's."""
        path = self.record_path(key)
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, indent=1).encode()
        if create_bytes_if_absent(path, content, scratch=scratch):
            return dict(record)
        winner = self.record(key)
        if winner is None:
            raise StorageUnavailable(f"commit record {path} exists but cannot be read; remove it to render again")
        return winner

    def record_path(self, key: str) -> Path:
        return self.root / "commits" / f"{key}.json"

    def record(self, key: str) -> dict[str, Any] | None:
        """The commit record of `key`, or None if there is none."""
        try:
            record = json.loads(self.record_path(key).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("key") == key else None

    def committed(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of those `keys` that are done: the record is there and so is its video, whole.

        Two listings and one read for each done key; a key that is not done costs nothing.
        """
        present = {path.stem for path in _listing(self.root / "commits") if path.suffix == ".json"}
        sizes = {path.name: path.stat().st_size for path in _listing(self.root / "videos")}
        done = {}
        for key in set(keys) & present:
            record = self.record(key)
            if record is not None and sizes.get(Path(str(record["uri"])).name) == record["size_bytes"]:
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


def _listing(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
