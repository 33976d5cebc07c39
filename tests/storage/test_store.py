"""What a store promises, on a disk and in a bucket; and what happens when it misbehaves."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import StorageFull, StorageUnavailable, UsageError
from pipeline.storage import local_store
from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.patience import Patience
from pipeline.storage.store import Store, open_store
from tests.chaos.s3_faults import Fault, Request, faults_before, forget_the_condition, refusing
from tests.conftest import s3_at


def test_bytes_and_files_are_created_once_and_replaced_whole(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"file")
    assert store.read("a/b") is None
    assert store.create("a/b", b"one") is True
    assert store.create("a/b", b"two") is False
    assert store.create("a/c", source) is True
    assert store.create("a/b", source) is False
    assert (store.read("a/b"), store.read("a/c"), source.read_bytes()) == (b"one", b"file", b"file")
    store.write("a/b", b"three")
    store.replace("a/c", source)
    assert store.read("a/b") == b"three"
    store.fetch("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"three"
    assert store.digest("a/b") == (hashlib.sha256(b"three").hexdigest(), 5)


def test_listing_sees_files_and_folders_of_one_level_and_what_others_wrote(store: Store) -> None:
    assert store.sizes("none") == {} and store.folders("none") == []
    store.write("x/1", b"a")
    store.write("x/y/2", b"bb")
    assert store.sizes("x") == {"1": 1} and store.folders("x") == ["y"]
    open_store(store.root_uri).write("x/3", b"ccc")
    assert store.sizes("x") == {"1": 1, "3": 3}
    store.delete("x/1")
    store.delete("x/absent")
    store.delete_folder("x/y")
    store.delete_folder("x/absent")
    assert store.sizes("x") == {"3": 3} and store.folders("x") == []


def test_a_store_that_can_be_written_is_prepared_without_a_trace(store: Store) -> None:
    store.prepare()
    assert store.folders("_attempts") == [] and store.sizes("_attempts") == {}


@dataclass
class OfConditionalPuts:
    """What happens to each of them."""

    fault: Fault

    def choose(self, request: Request) -> Fault | None:
        return self.fault if request.is_conditional_put else None


@pytest.mark.parametrize("fault", [forget_the_condition, refusing(501, "NotImplemented")], ids=["forgets", "501"])
def test_a_bucket_without_conditional_puts_is_found_out_and_looks_before_it_writes(
    bucket: str, s3_endpoint: str, fault: Fault, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"file")
    with faults_before(s3_endpoint, OfConditionalPuts(fault)) as proxy, s3_at(proxy.url):
        store = ObjectStore(bucket)
        store.prepare()
        assert store.is_exclusive is False
        worker = open_store(bucket, is_exclusive=store.is_exclusive)
        assert [worker.create("a", content) for content in (b"one", b"two", source)] == [True, False, False]
        assert store.read("a") == b"one" and store.sizes("_attempts") == {}


def test_a_bucket_that_cannot_be_used_is_refused_at_the_start(bucket: str, s3_endpoint: str) -> None:
    refused = OfConditionalPuts(refusing(403, "InvalidAccessKeyId"))
    with faults_before(s3_endpoint, refused) as proxy, s3_at(proxy.url):
        begin = time.monotonic()
        with pytest.raises(
            UsageError, match="must be permitted, got: a fault of the test; check the credentials"
        ) as caught:
            ObjectStore(bucket).prepare()
    assert time.monotonic() - begin < 10 and "\n" not in str(caught.value)


def test_a_large_file_goes_up_in_parts_and_is_created_once_too(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = ObjectStore(bucket), tmp_path / "source"
    source.write_bytes(b"x" * 11 * 2**20)
    monkeypatch.setattr(store._fs, "put_file", partial(store._fs.put_file, chunksize=5 * 2**20))
    assert store.create("big", source) is True
    source.write_bytes(b"y" * 11 * 2**20)
    assert store.create("big", source) is False
    assert store.size("big") == 11 * 2**20
    assert store._fs.info(f"{bucket}/big")["ETag"].endswith('-3"'), "it went up in three parts"
    assert store._fs.list_multipart_uploads(bucket.removeprefix("s3://")) == []


def test_no_such_bucket_and_no_credentials_are_usage(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="bucket must exist, got s3://no-such-bucket-here"):
        ObjectStore("s3://no-such-bucket-here/out").prepare()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UsageError, match="credentials must be set for s3://bucket/out"):
        ObjectStore("s3://bucket/out").prepare()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_uri_that_no_library_knows_is_usage() -> None:
    with pytest.raises(UsageError, match="output must be a path or a URI that fsspec knows, got 'nope://x'"):
        open_store("nope://x")


def failing(call: Callable[..., Any], errors: list[Exception], *, after: bool = False) -> Callable[..., Any]:
    """`call`, but the first times it raises: instead of doing its work, or after it was done."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if errors and not after:
            raise errors.pop(0)
        result = call(*args, **kwargs)
        if errors:
            raise errors.pop(0)
        return result

    return wrapped


# Waits as long as the real one by its own account, and in truth not at all.
HASTY = Patience(600.0, pause=lambda wait_s: True)


def test_a_bucket_that_fails_for_a_while_is_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(bucket, patience=HASTY)
    slow_down = [OSError(errno.EIO, "503 SlowDown") for _ in range(3)]
    monkeypatch.setattr(store._fs, "pipe_file", failing(store._fs.pipe_file, slow_down))
    store.write("a", b"x")
    assert store.read("a") == b"x"


def test_a_bucket_that_stays_away_is_unavailable(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits_s: list[float] = []
    store = ObjectStore(
        bucket, patience=Patience(600.0, pause=lambda wait_s: not waits_s.append(wait_s) and len(waits_s) < 4)
    )
    monkeypatch.setattr(store._fs, "pipe_file", failing(store._fs.pipe_file, [TimeoutError("timed out")] * 4))
    with pytest.raises(
        StorageUnavailable, match=r"storage failed 4 times in 0 s while writing .*/a: timed out; run the"
    ):
        store.write("a", b"x")


@pytest.mark.parametrize("kind", ["bytes", "file", "file in parts"])
def test_a_lost_acknowledgement_is_recognised_as_ours(
    bucket: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put arrived, its answer did not: the second try finds the name taken, by the first."""
    store = ObjectStore(bucket, patience=HASTY)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.write_bytes(b"mine__" * 2**20)
    theirs.write_bytes(b"theirs" * 2**20)
    put = "pipe_file" if kind == "bytes" else "put_file"
    real = partial(getattr(store._fs, put), chunksize=(5 if kind.endswith("parts") else 50) * 2**20)
    if kind.endswith("parts"):
        mine.write_bytes(b"mine__" * 2**21)
    monkeypatch.setattr(store._fs, put, failing(real, [TimeoutError("lost")], after=True))
    assert store.create("record", mine.read_bytes() if kind == "bytes" else mine) is True
    assert store.create("record", theirs.read_bytes() if kind == "bytes" else theirs) is False
    assert store.digest("record")[0] == hashlib.sha256(mine.read_bytes()).hexdigest()


def test_a_source_on_another_device_is_still_created_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, source = LocalStore(tmp_path / "out"), tmp_path / "source"
    source.write_bytes(b"clip")
    real_link = os.link

    def link(src: Path, dst: Path) -> None:
        if src == source:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real_link(src, dst)

    monkeypatch.setattr(local_store.os, "link", link)
    assert store.create("videos/a.mp4", source) is True
    assert store.create("videos/a.mp4", source) is False
    assert store.read("videos/a.mp4") == b"clip"
    assert list((tmp_path / "out" / "_attempts").iterdir()) == []


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store, source = LocalStore(tmp_path), tmp_path / "source"
    source.write_bytes(b"clip")
    monkeypatch.setattr(local_store.os, "link", full)
    with pytest.raises(StorageFull, match=r"disk full while writing .*; free space, then run the same command again"):
        store.create("videos/a.mp4", source)
    monkeypatch.setattr(local_store.os, "fsync", full)
    with pytest.raises(StorageFull):
        store.write("t", b"x")
    assert store.read("t") is None
    assert list((tmp_path / "_attempts").iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"output must be writable, got .*file/out"):
        LocalStore(tmp_path / "file" / "out").prepare()


def test_a_disk_that_fails_is_said_in_our_words_whatever_is_done_on_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("folder/a", b"x")
    with pytest.raises(StorageUnavailable, match=r"storage failed while deleting .*folder"):
        store.delete("folder")
    (tmp_path / "_attempts" / "run-1").write_bytes(b"in the way")
    with pytest.raises(StorageUnavailable, match=r"storage failed while making .*run-1"):
        store.scratch("run-1")


def test_a_disk_that_does_not_know_links_is_not_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(local_store.os, "link", unknown)
    store = LocalStore(tmp_path)
    store.prepare()
    assert not store.is_exclusive and store.create("a", b"x") and not store.create("a", b"y")
