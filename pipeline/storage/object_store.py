"""A store in a bucket, or in anything else that fsspec knows and that has a conditional put.

Bounded retries with back-off; an acknowledgement that was lost after the put arrived is recognised; errors that no
retry can help (no bucket, no credentials) are said at once.
"""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from pipeline.errors import PipelineError, StorageUnavailable, UsageError
from pipeline.storage.filesystem import ABANDONED_AFTER_S
from pipeline.storage.processes import writer, writer_is_gone

log = logging.getLogger(__name__)

T = TypeVar("T")
# Back-off between tries of one operation, beside what the store's client does by itself.
RETRY_WAITS_S = (0.2, 0.8, 3.0)
# A bucket gives 1,000 names an answer, one after the other: so many prefixes are listed at the same time.
LISTERS = 16
# Local folders for unfinished files; the rest of the name says whose, and of which run.
SCRATCH_PREFIX = "ltx-scratch-"


class ObjectStore:
    """A prefix in a bucket, or anything else that fsspec knows and that has a conditional put."""

    def __init__(self, root_uri: str) -> None:
        self._uri = root_uri.rstrip("/")
        # Listings are never cached: other writers' files must be seen.
        self._fs, path = url_to_fs(self._uri, use_listings_cache=False)
        self._path = str(path).rstrip("/")

    @property
    def root_uri(self) -> str:
        return self._uri

    def uri(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def shown(self, name: str) -> str:
        return self.uri(name)

    def prepare(self) -> None:
        probe = f"_attempts/.probe-{uuid.uuid4().hex[:12]}"
        if not self.create(probe, b"first"):
            raise UsageError(
                f"output must be writable, got {self._uri}: a fresh name was taken; choose another output="
            )
        try:
            exclusive = not self.create(probe, b"second")
        finally:
            self.delete(probe)
        if not exclusive:
            raise self._unconditional("which overwrote a file")
        self._sweep()
        _sweep_scratch()

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._try("reading", name, lambda: self._fs.cat_file(self._full(name))))
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        try:
            return int(self._try("looking at", name, lambda: self._fs.info(self._full(name), refresh=True)["size"]))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._try("writing", name, lambda: self._fs.pipe_file(self._full(name), content))

    def create(self, name: str, content: bytes | Path) -> bool:
        def put() -> None:
            try:
                if isinstance(content, Path):
                    self._fs.put_file(str(content), self._full(name), mode="create")
                else:
                    self._fs.pipe_file(self._full(name), content, mode="create")
            except OSError as error:
                # s3fs knows the refusal of a put by a detail that AWS alone says.
                if (code := _code_of(error)) in ("PreconditionFailed", "412"):
                    raise FileExistsError(self._full(name)) from error
                if code in ("NotImplemented", "501"):
                    raise self._unconditional(f"which answered: {error}") from error
                raise

        try:
            self._try("writing", name, put)
        except FileExistsError:
            # Ours after all, if its acknowledgement was lost and the client or `_try` sent it again.
            return isinstance(content, bytes) and self.read(name) == content
        return True

    def replace(self, name: str, source: Path) -> None:
        self._try("writing", name, lambda: self._fs.put_file(str(source), self._full(name)))

    def fetch(self, name: str, target: Path) -> None:
        self._try("reading", name, lambda: self._fs.get_file(self._full(name), str(target)))

    def digest(self, name: str) -> tuple[str, int]:
        def read() -> tuple[str, int]:
            with self._fs.open(self._full(name), "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256")
                return digest.hexdigest(), int(stream.tell())

        return self._try("reading back", name, read)

    def sizes(self, folder: str) -> dict[str, int]:
        return {_last(entry["name"]): int(entry["size"]) for entry in self._list(folder) if entry["type"] == "file"}

    def sizes_by_prefix(self, folder: str, prefixes: Sequence[str]) -> Iterator[tuple[str, int]]:
        with ThreadPoolExecutor(LISTERS) as pool:
            for found in pool.map(partial(self._beginning, folder), prefixes):
                yield from found

    def folders(self, folder: str) -> list[str]:
        return sorted(_last(entry["name"]) for entry in self._list(folder) if entry["type"] == "directory")

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._try("deleting", name, lambda: self._fs.rm_file(self._full(name)))

    def delete_folder(self, folder: str) -> None:
        with suppress(FileNotFoundError):
            self._try("deleting", folder, lambda: self._fs.rm(self._full(folder), recursive=True))
        _sweep_scratch(ended=_last(folder))

    def append(self, name: str, line: str) -> bool:
        return False

    def scratch(self, run_id: str) -> Path:
        _sweep_scratch()
        return Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{writer()}-{run_id}-"))

    def _sweep(self) -> None:
        """Abort uploads in parts that killed writers left: they are invisible, and billed until somebody does."""
        if not hasattr(self._fs, "list_multipart_uploads"):
            return
        bucket, _, prefix = self._path.partition("/")
        for upload in self._try("listing", "uploads", lambda: self._fs.list_multipart_uploads(bucket)):
            age_s = time.time() - upload["Initiated"].timestamp()
            if str(upload["Key"]).startswith(prefix) and age_s > ABANDONED_AFTER_S:
                self._fs.call_s3(
                    "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            return list(
                self._try("listing", folder, lambda: self._fs.ls(self._full(folder), detail=True, refresh=True))
            )
        except FileNotFoundError:
            return []

    def _beginning(self, folder: str, prefix: str) -> list[tuple[str, int]]:
        if not prefix:
            return list(self.sizes(folder).items())
        path = self._full(folder)
        try:
            found = self._try("listing", folder, lambda: self._fs.find(path, prefix=prefix, detail=True))
        except FileNotFoundError:
            return []
        names = {full.removeprefix(f"{path}/"): int(entry["size"]) for full, entry in found.items()}
        # Also what lies in folders below and, from clients that know no prefix, the others.
        return [(name, size) for name, size in names.items() if name.startswith(prefix) and "/" not in name]

    def _try(self, doing: str, name: str, call: Callable[[], T]) -> T:
        """Call until it succeeds, with back-off. Absent and existing files are answers, wrong credentials are final."""
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                return call()
            except UsageError:
                raise
            except (FileNotFoundError, FileExistsError) as error:
                if "bucket does not exist" in str(error):
                    raise UsageError(f"bucket must exist, got {self._uri}; create it or correct the name") from error
                raise
            except PermissionError as error:
                raise UsageError(f"{self.uri(name)} must be permitted, got: {error}; check the credentials") from error
            except Exception as error:
                if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"):
                    raise UsageError(
                        f"credentials must be set for {self._uri}, got: {error}; see its client"
                    ) from error
                if wait_s is None:
                    raise self._given_up(doing, name, error) from error
                log.warning("%s %s failed, trying again", doing, self.uri(name), extra={"facts": {"error": str(error)}})
                time.sleep(wait_s * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")

    def _unconditional(self, reason: str) -> UsageError:
        return UsageError(
            f"output must be in a store with conditional puts (If-None-Match), got {self._uri}, {reason}; use one that "
            "has them, or a local disk"
        )

    def _given_up(self, doing: str, name: str, error: Exception) -> PipelineError:
        tries = len(RETRY_WAITS_S) + 1
        return StorageUnavailable(
            f"storage failed {tries} times while {doing} {self.uri(name)}: {error}; run the same command again when "
            "it is back"
        )


def _sweep_scratch(ended: str | None = None) -> None:
    """Remove the folders of processes that are gone, and this one's of a run that has `ended`.

    A worker on Ray is ended from outside and cannot remove its own.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        owner = folder.name.removeprefix(SCRATCH_PREFIX)
        if writer_is_gone(owner) or (ended is not None and owner.startswith(f"{writer()}-{ended}-")):
            shutil.rmtree(folder, ignore_errors=True)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _code_of(error: OSError) -> str:
    """The code in S3's answer that became this error, or an empty text."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))
