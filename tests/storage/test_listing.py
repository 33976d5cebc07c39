"""Listing much: names by prefix on every store, and what a resume makes of it."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import assets as assets_module
from pipeline.storage.assets import INDEX, AssetStore, name_prefixes
from pipeline.storage.store import Store


def record(store: Store, key: str, stem: str, size_bytes: int = 5) -> dict[str, Any]:
    return {"key": key, "uri": store.uri(f"videos/{stem}.mp4"), "thumbnail_uri": store.uri(f"thumbnails/{stem}.jpg"),
            "attempt": 1, "sha256": "0" * 64, "size_bytes": size_bytes, "run_id": "r", "prompt": "a boat"}  # fmt: skip


def commit(store: Store, key: str, stem: str) -> None:
    store.write(f"videos/{stem}.mp4", b"video")
    store.write(f"commits/{key}.json", json.dumps(record(store, key, stem)).encode())


def test_names_by_prefix_are_those_of_the_folder_itself(store: Store) -> None:
    for name in ("a1", "a2", "b1", "c", "index/a3"):
        store.write(f"x/{name}", name.encode())
    prefixes = ["a", "b1"]
    found = {name: size for name, size in store.sizes_by_prefix("x", prefixes) if name.startswith(tuple(prefixes))}
    assert found == {"a1": 2, "a2": 2, "b1": 2}
    assert dict(store.sizes_by_prefix("x", [""])) == {"a1": 2, "a2": 2, "b1": 2, "c": 1}
    assert list(store.sizes_by_prefix("x", [])) == [] or store.root_uri.startswith("file:")
    assert list(store.sizes_by_prefix("absent", ["a", ""])) == []


@pytest.mark.parametrize("most", [1, 3, 50, 10_000])
def test_prefixes_cover_every_name_once_and_no_more_than_so_many_together(most: int) -> None:
    draw = random.Random(most)
    names = {"".join(draw.choices("ab7-", k=draw.randint(1, 6))) for _ in range(300)} | {"a.mp4", "a.mp4.b.mp4"}
    prefixes = list(name_prefixes(sorted(names), most))
    covered = {name for name in names for prefix in prefixes if name.startswith(prefix)}
    assert covered == names
    assert most < 10_000 or len(prefixes) == 1
    # A name that others begin with is a prefix of its own, and may so be listed beside more.
    own = [prefix for prefix in prefixes if prefix not in names]
    assert all(sum(name.startswith(prefix) for name in names) <= most for prefix in own)


def test_no_name_needs_no_prefix() -> None:
    assert list(name_prefixes([], 10)) == []


def test_done_clips_are_found_however_the_listing_is_cut(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets_module, "LISTED_TOGETHER", 2)
    monkeypatch.setattr(assets_module, "INDEX_FILE_RECORDS", 3)
    keys = [f"{number:x}" * 64 for number in range(16)]
    for number, key in enumerate(keys):
        commit(store, key, f"shot-{number % 4}-{number}.{key[:12]}")
    assets = AssetStore(store)
    assert assets.index_records("run-1", keys[:7]) == 7
    assert len(store.sizes(INDEX)) == 3
    store.delete(f"videos/shot-1-1.{keys[1][:12]}.mp4")
    store.write(f"videos/shot-1-9.{keys[9][:12]}.mp4", b"torn")
    store.delete(f"commits/{keys[2]}.json")
    found = assets.committed({*keys, "absent"})
    assert set(found) == set(keys) - {keys[1], keys[2], keys[9]}
    for number in (0, 15):
        uri = store.uri(f"videos/shot-{number % 4}-{number}.{keys[number][:12]}.mp4")
        assert (found[keys[number]]["uri"], found[keys[number]]["prompt"]) == (uri, "a boat")
    assert assets.compact("run-2") == 9


def test_an_index_of_whole_records_alone_is_still_read(store: Store) -> None:
    """Releases before this one wrote two columns."""
    key = "d" * 64
    commit(store, key, "a")
    torn = "e" * 64
    store.write(f"commits/{torn}.json", b"{}")
    sink = io.BytesIO()
    texts = {key: json.dumps(record(store, key, "a")), torn: "{}"}
    pq.write_table(pa.table({"key": list(texts), "record": list(texts.values())}), sink)
    store.write(f"{INDEX}/run-0-00000.parquet", sink.getvalue())
    store.write(f"commits/{key}.json", b"not looked at")
    found = AssetStore(store).committed([key, torn])
    assert {key: found[key]["uri"] for key in found} == {key: store.uri("videos/a.mp4")}


@pytest.mark.parametrize("size_bytes", ["5", None, 5.5])
def test_a_record_with_an_impossible_size_is_no_record(store: Store, size_bytes: Any) -> None:
    key = "d" * 64
    commit(store, key, "a")
    store.write(f"commits/{key}.json", json.dumps(record(store, key, "a", size_bytes)).encode())
    assets = AssetStore(store)
    assert assets.committed([key]) == {}
    assets.compact("run-1")
    assert assets.committed([key]) == {}
