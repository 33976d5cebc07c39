"""The commit, on a disk and in a bucket: created if absent, adopted if there, never torn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageUnavailable
from pipeline.storage.assets import INDEX, AssetStore, RunningIndex
from pipeline.storage.local_store import LocalStore
from pipeline.storage.store import Store

KEY = "c" * 64


@pytest.fixture
def assets(store: Store) -> AssetStore:
    return AssetStore(store)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def made(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def published(
    assets: AssetStore, scratch: Path, content: bytes = b"clip", stem: str = "a.123", key: str = KEY
) -> dict[str, object]:
    """A video under its final name, and the record that would name it."""
    video = assets.publish_video(made(scratch, "video", content), stem)
    return {"key": key, "uri": video.uri, "thumbnail_uri": video.uri.replace("videos", "thumbnails"), "attempt": 1,
            "sha256": video.sha256, "size_bytes": video.size_bytes, "run_id": "r"}  # fmt: skip


def test_a_video_gets_its_name_once_and_the_second_is_told_what_is_there(assets: AssetStore, scratch: Path) -> None:
    first = assets.publish_video(made(scratch, "1", b"one"), "a.123")
    second = assets.publish_video(made(scratch, "2", b"two"), "a.123")
    assert (first.created, second.created) == (True, False)
    assert assets.store.read("videos/a.123.mp4") == b"one"
    assert second.sha256 == first.sha256 and second.uri == first.uri == assets.store.uri("videos/a.123.mp4")


def test_a_broken_file_can_be_looked_at_and_replaced(assets: AssetStore, scratch: Path) -> None:
    broken = assets.publish_video(made(scratch, "1", b"broken"), "a.123")
    assets.fetch(broken, scratch / "copy")
    assert (scratch / "copy").read_bytes() == b"broken"
    whole = assets.replace(broken, made(scratch, "2", b"whole"))
    assert assets.store.read("videos/a.123.mp4") == b"whole" and whole.size_bytes == 5


def test_of_many_racing_commits_exactly_one_wins_and_all_see_it(assets: AssetStore, scratch: Path) -> None:
    record = published(assets, scratch)

    def run(index: int) -> object:
        return assets.commit(KEY, {**record, "run_id": f"run-{index}"})["run_id"]

    with ThreadPoolExecutor(16) as pool:
        winners = set(pool.map(run, range(48)))
    assert len(winners) == 1
    assert list(assets.store.sizes("commits")) == [f"{KEY}.json"]


def test_done_means_a_record_and_a_whole_video(assets: AssetStore, scratch: Path) -> None:
    record = published(assets, scratch)
    assert assets.committed([KEY]) == {}
    assets.commit(KEY, record)
    assert set(assets.committed([KEY, "other"])) == {KEY}
    assets.store.write("videos/a.123.mp4", b"cl")
    assert assets.committed([KEY]) == {}
    assets.store.delete("videos/a.123.mp4")
    assert assets.committed([KEY]) == {}


@pytest.mark.parametrize("torn", ["", '{"key": "cc', "[]", '{"key": "' + KEY + '"}'])
def test_a_torn_record_is_no_record_and_gives_way_to_a_whole_one(assets: AssetStore, scratch: Path, torn: str) -> None:
    assets.store.write(f"commits/{KEY}.json", torn.encode())
    assert assets.record(KEY) is None and assets.committed([KEY]) == {}
    assets.commit(KEY, published(assets, scratch))
    assert set(assets.committed([KEY])) == {KEY}
    assert assets.store.read(f"commits/{KEY}.unreadable") == torn.encode()


def test_a_record_whose_video_was_lost_is_replaced_when_it_comes_out_otherwise(
    assets: AssetStore, scratch: Path
) -> None:
    """Another GPU or encoder build gives other bytes: the record must name what is there, or it is redone for ever."""
    assets.commit(KEY, published(assets, scratch, b"first"))
    assets.compact("run-1")
    assets.store.delete("videos/a.123.mp4")
    again = {**published(assets, scratch, b"other bytes"), "run_id": "r2"}
    assert assets.commit(KEY, again)["run_id"] == "r2"
    assert assets.committed([KEY])[KEY]["sha256"] == again["sha256"]


def test_a_twin_that_was_committed_under_another_name_stands(assets: AssetStore, scratch: Path) -> None:
    first = assets.commit(KEY, published(assets, scratch))
    twin = {**published(assets, scratch, stem="b.123"), "run_id": "r2"}
    assert assets.commit(KEY, twin) == assets.record(KEY) == first


def test_a_moved_output_has_the_uris_of_where_it_is_now(tmp_path: Path, scratch: Path) -> None:
    assets = AssetStore(LocalStore(tmp_path / "out"))
    assets.commit(KEY, published(assets, scratch))
    (tmp_path / "out").rename(tmp_path / "moved out")
    record = AssetStore(LocalStore(tmp_path / "moved out")).committed([KEY])[KEY]
    assert record["uri"] == (tmp_path / "moved out" / "videos" / "a.123.mp4").as_uri()


def test_a_resume_reads_the_index_and_only_the_records_that_are_newer(
    assets: AssetStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{number:064d}" for number in range(6)]
    for key in keys[:4]:
        assets.commit(key, published(assets, scratch, stem=key[-3:], key=key))
    assert assets.compact("run-1") == 4
    assert assets.compact("run-2") == 0
    for key in keys[4:]:
        assets.commit(key, published(assets, scratch, stem=key[-3:], key=key))
    opened: list[str] = []
    read = assets.store.read
    monkeypatch.setattr(assets.store, "read", lambda name: opened.append(name) or read(name))
    assert set(assets.committed(keys)) == set(keys)
    assert sorted(opened) == [f"commits/{keys[4]}.json", f"commits/{keys[5]}.json", f"{INDEX}/run-1-00000.parquet"]


def test_a_run_compacts_its_records_as_they_come_so_that_a_killed_one_leaves_few(
    assets: AssetStore, scratch: Path
) -> None:
    keys = [f"{number:064d}" for number in range(5)]
    running = RunningIndex(assets, "run-1", every=2)
    for key in keys:
        assets.commit(key, published(assets, scratch, stem=key[-3:], key=key))
        running.note(key)
    running.close(wait=True)
    indexed = [key for table in assets._index_tables(("key",)) for key in table["key"].to_pylist()]
    assert indexed == keys[:4]
    assert sorted(assets.store.sizes(INDEX)) == ["run-1-00000.parquet", "run-1-00001.parquet"]
    assert assets.compact("run-1") == 1 and set(assets.committed(keys)) == set(keys)


def test_an_index_that_cannot_be_written_stops_nothing(
    assets: AssetStore, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise StorageUnavailable("the store is away")

    monkeypatch.setattr(AssetStore, "index_records", fail)
    running = RunningIndex(assets, "run-1", every=1)
    running.note(KEY)
    running.close(wait=True)
    assert assets.store.sizes(INDEX) == {}


def test_a_record_that_was_removed_is_not_done_whatever_the_index_says(assets: AssetStore, scratch: Path) -> None:
    assets.commit(KEY, published(assets, scratch))
    assets.compact("run-1")
    assets.store.delete(f"commits/{KEY}.json")
    assert assets.committed([KEY]) == {}


def test_a_torn_index_costs_reads_and_nothing_else(assets: AssetStore, scratch: Path) -> None:
    assets.commit(KEY, published(assets, scratch))
    assets.compact("run-1")
    assets.store.write(f"{INDEX}/run-1-00000.parquet", b"PAR1")
    assert set(assets.committed([KEY])) == {KEY}


@pytest.mark.parametrize("is_readable", [True, False], ids=["whole", "unreadable"])
def test_a_clip_that_was_removed_and_rendered_again_is_done_whatever_index_has_the_last_name(
    assets: AssetStore, scratch: Path, is_readable: bool
) -> None:
    """Index files are read by their names, and `nightly` sorts behind every run that is named by its date."""
    gone = published(assets, scratch, b"first")
    assets.commit(KEY, gone)
    if not is_readable:
        assets.store.write(f"commits/{KEY}.json", b"half of")
    assets.compact("nightly")
    assets.store.delete(f"commits/{KEY}.json")
    assets.store.delete("videos/a.123.mp4")
    again = published(assets, scratch, b"rendered again")
    assets.commit(KEY, again)
    assets.compact("20261120")
    assert {key: record["size_bytes"] for key, record in assets.committed({KEY}).items()} == {KEY: again["size_bytes"]}
