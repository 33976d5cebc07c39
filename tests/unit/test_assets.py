"""The commit: created if absent, adopted if there, never torn."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageFull, StorageUnavailable, UsageError
from pipeline.storage import filesystem
from pipeline.storage.assets import AssetStore
from pipeline.storage.filesystem import create_folder, create_if_absent, write_atomically

KEY = "k" * 64


@pytest.fixture
def store(tmp_path: Path) -> AssetStore:
    (tmp_path / "_attempts").mkdir()
    return AssetStore(tmp_path)


def made(store: AssetStore, name: str, content: bytes) -> Path:
    path = store.root / "_attempts" / name
    path.write_bytes(content)
    return path


def test_a_video_gets_its_name_once_and_the_second_is_told_what_is_there(store: AssetStore) -> None:
    first = store.publish_video(made(store, "1", b"one"), "a.123")
    second = store.publish_video(made(store, "2", b"two"), "a.123")
    assert (first.created, second.created) == (True, False)
    assert first.path.read_bytes() == b"one"
    assert second.sha256 == first.sha256 and second.uri == first.uri == first.path.as_uri()


def test_a_broken_file_can_be_replaced(store: AssetStore) -> None:
    broken = store.publish_video(made(store, "1", b"broken"), "a.123")
    whole = store.replace(broken, made(store, "2", b"whole"))
    assert broken.path.read_bytes() == b"whole" and whole.size_bytes == 5


def record(uri: str, size_bytes: int, run_id: str = "r") -> dict[str, object]:
    return {"key": KEY, "uri": uri, "size_bytes": size_bytes, "run_id": run_id, "attempt": 1}


def test_of_many_racing_commits_exactly_one_wins_and_all_see_it(store: AssetStore) -> None:
    def commit(index: int) -> object:
        scratch = store.root / "_attempts" / f"{index}.json"
        return store.commit(KEY, record("u", 1, f"run-{index}"), scratch=scratch)["run_id"]

    with ThreadPoolExecutor(16) as pool:
        winners = set(pool.map(commit, range(64)))
    assert len(winners) == 1
    assert list((store.root / "commits").iterdir()) == [store.record_path(KEY)]


def test_done_means_a_record_and_a_whole_video(store: AssetStore) -> None:
    video = store.publish_video(made(store, "1", b"clip"), "a.123")
    assert store.committed([KEY]) == {}
    store.commit(KEY, record(video.uri, video.size_bytes), scratch=store.root / "_attempts" / "s.json")
    assert set(store.committed([KEY, "other"])) == {KEY}
    video.path.write_bytes(b"cl")
    assert store.committed([KEY]) == {}
    video.path.unlink()
    assert store.committed([KEY]) == {}


def test_a_torn_record_is_no_record(store: AssetStore) -> None:
    store.record_path(KEY).parent.mkdir()
    store.record_path(KEY).write_text('{"key": "kk')
    assert store.record(KEY) is None
    with pytest.raises(StorageUnavailable, match="remove it to render again"):
        store.commit(KEY, record("u", 1), scratch=store.root / "_attempts" / "s.json")


def test_a_source_on_another_device_is_still_created_whole(store: AssetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    source, links = made(store, "1", b"clip"), []
    real_link = os.link

    def link(src: Path, dst: Path) -> None:
        links.append(src)
        if src == source:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real_link(src, dst)

    monkeypatch.setattr(filesystem.os, "link", link)
    target = store.root / "videos" / "a.mp4"
    assert create_if_absent(target, source) is True
    assert create_if_absent(target, source) is False
    assert target.read_bytes() == b"clip"
    assert [path.name for path in target.parent.iterdir()] == ["a.mp4"]


def test_a_full_disk_is_said_to_be_full(store: AssetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filesystem.os, "link", full)
    with pytest.raises(StorageFull, match=r"disk full while writing .*; free space, then run the same command again"):
        store.publish_video(made(store, "1", b"clip"), "a.123")
    monkeypatch.setattr(filesystem.os, "fsync", full)
    with pytest.raises(StorageFull):
        write_atomically(store.root / "t", b"x")
    assert not (store.root / "t").exists()
    assert [path.name for path in store.root.iterdir() if path.name.startswith(".")] == []


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"output must be writable, got .*file/out"):
        create_folder(tmp_path / "file" / "out")
