"""The commit: created if absent, adopted if there, never torn."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageFull, UsageError
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


def published(store: AssetStore, content: bytes = b"clip", stem: str = "a.123") -> dict[str, object]:
    """A video under its final name, and the record that would name it."""
    video = store.publish_video(made(store, "video", content), stem)
    return {"key": KEY, "uri": video.uri, "thumbnail_uri": video.uri.replace("videos", "thumbnails"), "attempt": 1,
            "sha256": video.sha256, "size_bytes": video.size_bytes, "run_id": "r"}  # fmt: skip


def commit(store: AssetStore, record: dict[str, object], name: str = "s") -> dict[str, object]:
    return store.commit(KEY, record, scratch=store.root / "_attempts" / f"{name}.json")


def test_of_many_racing_commits_exactly_one_wins_and_all_see_it(store: AssetStore) -> None:
    record = published(store)

    def run(index: int) -> object:
        return commit(store, {**record, "run_id": f"run-{index}"}, str(index))["run_id"]

    with ThreadPoolExecutor(16) as pool:
        winners = set(pool.map(run, range(64)))
    assert len(winners) == 1
    assert list((store.root / "commits").iterdir()) == [store.record_path(KEY)]


def test_done_means_a_record_and_a_whole_video(store: AssetStore) -> None:
    record = published(store)
    assert store.committed([KEY]) == {}
    commit(store, record)
    assert set(store.committed([KEY, "other"])) == {KEY}
    video = store.root / "videos" / "a.123.mp4"
    video.write_bytes(b"cl")
    assert store.committed([KEY]) == {}
    video.unlink()
    assert store.committed([KEY]) == {}


@pytest.mark.parametrize("torn", ["", '{"key": "kk', "[]", '{"key": "' + KEY + '"}'])
def test_a_torn_record_is_no_record_and_gives_way_to_a_whole_one(store: AssetStore, torn: str) -> None:
    store.record_path(KEY).parent.mkdir()
    store.record_path(KEY).write_text(torn)
    assert store.record(KEY) is None and store.committed([KEY]) == {}
    commit(store, published(store))
    assert set(store.committed([KEY])) == {KEY}
    assert store.record_path(KEY).with_suffix(".unreadable").read_text() == torn


def test_a_record_whose_video_was_lost_is_replaced_when_it_comes_out_otherwise(store: AssetStore) -> None:
    """Another GPU or encoder build gives other bytes: the record must name what is there, or it is redone for ever."""
    commit(store, published(store, b"first"))
    (store.root / "videos" / "a.123.mp4").unlink()
    again = {**published(store, b"other bytes"), "run_id": "r2"}
    assert commit(store, again)["run_id"] == "r2"
    assert store.committed([KEY])[KEY]["sha256"] == again["sha256"]


def test_a_twin_that_was_committed_under_another_name_stands(store: AssetStore) -> None:
    first = commit(store, published(store))
    twin = {**published(store, stem="b.123"), "run_id": "r2"}
    assert commit(store, twin) == store.record(KEY) == first


def test_a_moved_output_has_the_uris_of_where_it_is_now(store: AssetStore, tmp_path: Path) -> None:
    commit(store, published(store))
    moved = tmp_path.parent / f"{tmp_path.name} moved"
    tmp_path.rename(moved)
    record = AssetStore(moved).committed([KEY])[KEY]
    assert record["uri"] == (moved / "videos" / "a.123.mp4").as_uri()
    moved.rename(tmp_path)


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
