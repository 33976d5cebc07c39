"""A store in a bucket, or in anything else that fsspec knows.

What may pass is tried again with back-off; an acknowledgement that was lost after the put arrived is recognised; errors
that no retry can help (no bucket, no credentials) are said at once. A store without conditional puts is recognised by
`prepare`; what it then takes to stay safe is in `committer.py`.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import PipelineError, UsageError
from pipeline.storage.clients import ANSWER_TIMEOUT_S, client_of
from pipeline.storage.filesystem import FULL_DISK_ERRNOS, sha256_of, storage_error
from pipeline.storage.patience import QUICK, MayPass, Patience, keep_trying
from pipeline.storage.processes import writer, writer_is_gone

log = logging.getLogger(__name__)

T = TypeVar("T")
# A bucket gives 1,000 names an answer, one after the other: so many prefixes are listed at the same time.
LISTERS = 16
# Local folders for unfinished files; the rest of the name says whose, and of which run.
SCRATCH_PREFIX = "ltx-scratch-"
# In the name of what `prepare` tries the store with: before it whose it is, behind it when it was made.
_PROBE = "-probe-"
_UNSUPPORTED = ("NotImplemented", "501", "MethodNotAllowed", "405")
# The client's library is not imported here, so its errors are known by their names.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")


class _Unconditional(UsageError):
    """The store does not know conditional puts."""


class ObjectStore:
    """A prefix in a bucket, or anything else that fsspec knows.

    Against an S3 endpoint that is silent an operation ends with StorageUnavailable: a request stands still for
    `answer_timeout_s` at most, is tried CLIENT_TRIES times, and the operation as a whole again while `patience` lasts.
    With the defaults that is under 60 s, and under 90 s for an upload in parts, whose abort is waited for too. A
    transfer that moves, however slowly, is never ended.
    """

    def __init__(
        self,
        root_uri: str,
        *,
        patience: Patience = QUICK,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        is_exclusive: bool = True,
    ) -> None:
        self.is_exclusive = is_exclusive
        self._uri = root_uri.rstrip("/")
        self._patience = patience
        # Listings are never cached: other writers' files must be seen.
        self._fs, path = client_of(self._uri, tries=1, answer_timeout_s=answer_timeout_s, use_listings_cache=False)
        self._path = path.rstrip("/")

    def with_patience(self, patience: Patience) -> ObjectStore:
        other = copy(self)
        other._patience = patience
        return other

    @property
    def root_uri(self) -> str:
        return self._uri

    def uri(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def shown(self, name: str) -> str:
        return self.uri(name)

    def prepare(self) -> None:
        probe = f"_attempts/{writer()}{_PROBE}{time.time_ns()}-{uuid.uuid4().hex[:12]}"
        self.is_exclusive = True
        try:
            if not self.create(probe, b"first"):
                raise UsageError(
                    f"output must be writable, got {self._uri}: a fresh name was taken; choose another output="
                )
            self.is_exclusive = not self.create(probe, b"second")
        except _Unconditional:
            self.is_exclusive = False
            self.write(probe, b"first")
        self.delete(probe)

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
        self._try("writing", name, lambda: self._put(name, content))

    def create(self, name: str, content: bytes | Path) -> bool:
        try:
            self._try("writing", name, lambda: self._put_if_absent(name, content))
        except FileExistsError:
            # Ours after all, if a put arrived whose acknowledgement did not: sent again, it finds the name taken.
            return self._holds(name, content)
        return True

    def replace(self, name: str, source: Path) -> None:
        self._try("writing", name, lambda: self._put(name, source))

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

    def sweep(self, before_ns: int) -> None:
        _sweep_scratch()
        for name in self.sizes("_attempts"):
            _, mark, made = name.partition(_PROBE)
            if mark and (writer_is_gone(name) or int(made.partition("-")[0]) < before_ns):
                self.delete(f"_attempts/{name}")
        if not hasattr(self._fs, "list_multipart_uploads"):
            return
        # Uploads in parts that killed writers left are invisible, and billed until somebody aborts them.
        bucket, _, key = self._path.partition("/")
        prefix = f"{key}/" if key else ""
        try:
            for upload in self._try("listing the uploads of", "", lambda: list(self._uploads(bucket, prefix))):
                if upload["Initiated"].timestamp() * 1e9 < before_ns and upload["Key"].startswith(prefix):
                    with suppress(FileNotFoundError):  # another driver sweeps too, or it was completed just now
                        self._try("sweeping", upload["Key"], partial(self._abort, bucket, upload))
        except PipelineError as error:
            # Not every store lists them, and not every key may.
            log.warning("abandoned uploads were not swept: %s", error)

    def _uploads(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Every upload in parts that is open below `prefix`; a listing holds 1,000 at most."""
        more: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, bucket: str, upload: dict[str, Any]) -> None:
        self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _put(self, name: str, content: bytes | Path, **options: str) -> None:
        try:
            if isinstance(content, Path):
                self._fs.put_file(str(content), self._full(name), **options)
            else:
                self._fs.pipe_file(self._full(name), content, **options)
        except FileNotFoundError as error:
            # A completion that arrived unacknowledged has ended the upload that its repetition names.
            if _code_of(error) in ("NoSuchUpload", "404"):
                raise MayPass(str(error)) from error
            raise

    def _put_if_absent(self, name: str, content: bytes | Path) -> None:
        """FileExistsError if the name is taken."""
        if not self.is_exclusive:
            with suppress(FileNotFoundError):
                self._fs.info(self._full(name), refresh=True)
                raise FileExistsError(self._full(name))
            return self._put(name, content)
        try:
            self._put(name, content, mode="create")
        except OSError as error:
            # s3fs knows the refusal of a put by a detail that AWS alone says.
            if (code := _code_of(error)) in ("PreconditionFailed", "412"):
                raise FileExistsError(self._full(name)) from error
            if code in _UNSUPPORTED:
                raise _Unconditional(
                    f"{self._uri} has no conditional puts, which it had when it was opened: {error}; run the same "
                    "command again"
                ) from error
            raise

    def _holds(self, name: str, content: bytes | Path) -> bool:
        """If the file under that name is `content`, by size and then by hash."""
        if isinstance(content, bytes):
            return self.read(name) == content
        if self.size(name) != content.stat().st_size:
            return False
        return self.digest(name)[0] == sha256_of(content)

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
        return keep_trying(lambda: self._translated(doing, name, call), self._patience, f"{doing} {self.uri(name)}")

    def _translated(self, doing: str, name: str, call: Callable[[], T]) -> T:
        """Foreign errors as ours: absent and existing files are answers, missing rights are final, others may pass."""
        try:
            return call()
        except (PipelineError, MayPass):
            raise
        except (FileNotFoundError, FileExistsError) as error:
            if "bucket does not exist" in str(error) or _code_of(error) == "NoSuchBucket":
                raise UsageError(f"bucket must exist, got {self._uri}; create it or correct the name") from error
            raise
        except PermissionError as error:
            raise UsageError(f"{self.uri(name)} must be permitted, got: {error}; check the credentials") from error
        except Exception as error:
            if type(error).__name__ in _NO_CREDENTIALS:
                raise UsageError(f"credentials must be set for {self._uri}, got: {error}; see its client") from error
            if _code_of(error) in _UNSUPPORTED:
                raise UsageError(f"the store of {self._uri} must support {doing} files, got: {error}") from error
            if isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS:  # this machine's, of a fetched file
                raise storage_error(error, f"{doing} {self.uri(name)}") from error
            raise MayPass(str(error) or type(error).__name__) from error


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


def _code_of(error: Exception) -> str:
    """The code in S3's answer that became this error, or an empty text."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))
