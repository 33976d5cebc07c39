"""Manifests: what is accepted, and how each unreadable one is refused."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.storage.manifest import Manifest, open_manifest


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows(manifest: Manifest) -> list[dict[str, Any]]:
    return list(manifest.rows())


def test_files_of_a_folder_come_in_path_order_without_hidden_ones_or_partition_columns(tmp_path: Path) -> None:
    write(tmp_path / "date=2026-11-21" / "a.parquet", id=["c"], prompt=["x"])
    write(tmp_path / "date=2026-11-20" / "b.parquet", id=["b"], prompt=["x"])
    write(tmp_path / "date=2026-11-20" / "a.parquet", id=["a"], prompt=["x"])
    write(tmp_path / "_hidden" / "a.parquet", id=["z"], prompt=["x"])
    manifest = open_manifest(str(tmp_path))
    assert [row["id"] for row in rows(manifest)] == ["a", "b", "c"]
    assert set(rows(manifest)[0]) == {"id", "prompt"}
    assert manifest.num_rows == 3


def test_a_glob_and_a_path_with_an_equals_sign_are_found(tmp_path: Path) -> None:
    write(tmp_path / "date=1" / "x.parquet", id=["a"], prompt=["x"])
    assert open_manifest(str(tmp_path / "date=1" / "x.parquet")).num_rows == 1
    assert open_manifest(str(tmp_path / "*" / "*.parquet")).num_rows == 1
    assert open_manifest((tmp_path / "date=1" / "x.parquet").as_uri()).num_rows == 1


def test_lossless_casts_are_accepted(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.parquet",
        id=pa.array(["a", "b"]).dictionary_encode(),
        prompt=pa.array(["x", "y"], pa.large_string()),
        width=pa.array([192, None], pa.int64()),
        num_frames=pa.array([25.0, 33.0]),
        fps=pa.array([29.97, 24], pa.float32()),
        images=pa.nulls(2),
        tags=pa.array([{"scene": "sea"}, None]),
        seed=pa.array([Decimal(2**53 + 1), None], pa.decimal128(20, 0)),
        x_note=pa.array([1, 2]),
    )
    first = rows(open_manifest(str(file)))[0]
    assert (first["id"], first["fps"], first["tags"], first["seed"]) == ("a", 29.97, {"scene": "sea"}, 2**53 + 1)
    assert "x_note" not in first


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["x"]}, "manifest must have a column id"),
        ({"id": ["a"]}, "manifest must have a column prompt"),
        ({"id": ["a"], "prompt": ["x"], "widht": [1]}, "column widht .* is unknown; did you mean width"),
        ({"id": ["a"], "prompt": ["x"], "zzz": [1]}, "carry it through by naming it x_zzz"),
        ({"id": [1], "prompt": ["x"]}, "column id must be string, got int64"),
        ({"id": ["a"], "prompt": ["x"], "width": ["wide"]}, "column width must be int32, got string"),
        ({"id": ["a"], "prompt": ["x"], "tags": [["a", "b"]]}, "column tags must be map"),
        ({"id": ["a"], "prompt": ["x"], "images": ["u"]}, "column images must be list"),
        ({"id": ["a"], "prompt": ["x"], "enhance_prompt": [1]}, "column enhance_prompt must be bool, got int64"),
    ],
)
def test_impossible_columns_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_manifest(str(write(tmp_path / "m.parquet", **columns)))


def test_what_is_not_a_readable_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    for uri, message in (
        (tmp_path / "absent.parquet", "manifest must exist"),
        (tmp_path / "m.parquet", "manifest must be Parquet"),
        (tmp_path / "empty", "must hold at least one .parquet file"),
        ("nope://bucket/x.parquet", "manifest must be readable"),
    ):
        with pytest.raises(UsageError, match=message):
            open_manifest(str(uri))


def test_x_columns_of_any_type_are_kept_as_stored_also_where_a_file_lacks_them(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=["a"], prompt=["x"], x_at=pa.array([5], pa.timestamp("ns")))
    write(tmp_path / "b.parquet", id=["b"], prompt=["x"], x_raw=[b"\xff"])
    values = open_manifest(str(tmp_path)).x_values()
    assert values.column_names == ["x_at", "x_raw"]
    assert values.column("x_at").cast(pa.int64()).to_pylist() == [5, None]
    assert values.column("x_raw").to_pylist() == [None, b"\xff"]


def test_a_torn_page_or_text_that_is_not_unicode_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "m.parquet", id=["a" * 50 + str(i) for i in range(2000)], prompt=["x"] * 2000)
    content = bytearray(file.read_bytes())
    content[40:400] = b"\x00" * 360
    file.write_bytes(content)
    with pytest.raises(UsageError, match="must be readable to its end"):
        rows(open_manifest(str(file)))
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    with pytest.raises(UsageError, match="must be readable to its end"):
        rows(open_manifest(str(write(tmp_path / "l.parquet", id=["a"], prompt=latin))))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["id", "prompt", "prompt"])
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(UsageError, match="got prompt twice"):
        open_manifest(str(tmp_path / "m.parquet"))


def test_x_columns_must_have_one_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=["a"], prompt=["x"], x_n=[1])
    write(tmp_path / "b.parquet", id=["b"], prompt=["x"], x_n=["one"])
    with pytest.raises(UsageError, match="x_n must have one type"):
        open_manifest(str(tmp_path))


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "m.parquet", id=["a"], prompt=["x"])
    before = open_manifest(str(file)).sha256
    write(file, id=["a"], prompt=["y"])
    assert open_manifest(str(file)).sha256 != before
