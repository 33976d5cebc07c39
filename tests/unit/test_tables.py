"""Results and ledger on disk: the contract's columns, and a ledger that is whole at every flush."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.records.outcome import Failed, LedgerEntry, failed_row, rejected_row, rendered_row, skipped_row
from pipeline.storage import tables
from pipeline.storage.local_store import LocalStore
from pipeline.storage.tables import LedgerTable, read_ledger, read_rows, write_results
from tests.unit.makers import FACTS, S, entry, item, rendered

CONTRACT_COLUMNS = [
    "id",
    "row_index",
    "status",
    "uri",
    "sha256",
    "size_bytes",
    "thumbnail_uri",
    "content_key",
    "prompt",
    "seed",
    "width",
    "height",
    "num_frames",
    "fps",
    "duration_s",
    "has_audio",
    "sample_rate_hz",
    "recipe",
    "model",
    "model_fingerprint",
    "precision",
    "parallel",
    "parallel_reason",
    "num_gpus",
    "attempts",
    "memory_rung",
    "error_class",
    "error_message",
    "rendered_by_run",
    "queued_s",
    "text_encode_s",
    "denoise_s",
    "upsample_s",
    "decode_s",
    "encode_s",
    "upload_s",
    "wall_s",
    "gpu_seconds",
    "peak_gpu_memory_bytes",
    "peak_host_memory_bytes",
    "energy_j",
    "cost_usd",
    "cost_loaded_usd",
    "estimated_gpu_seconds",
    "estimated_cost_usd",
    "started_at",
    "finished_at",
    "tags",
]


def test_results_have_the_contracts_columns_and_the_x_columns_as_they_were(tmp_path: Path) -> None:
    work = item(0, tags={"scene": "sea"})
    failed = Failed(item(2), "EngineFault", "went wrong", "EngineFault", 0, S)
    odd = {"id": "b", "num_frames": 2**40, "width": 1.5, "fps": 2**60, "duration_s": 1e300, "tags": [(1, 2)]}
    rows = [
        rendered_row(rendered(work), FACTS),
        rejected_row(odd, 1, "row 1: ...", FACTS),
        failed_row(failed, FACTS),
        skipped_row(item(3), rendered_row(rendered(work), FACTS), FACTS),
    ]
    x_values = pa.table(
        {
            "x_at": pa.array([0, 1, None, 3], pa.timestamp("ns", "UTC")),
            "x_big": pa.array([2**63 + 5, 0, 1, 2], pa.uint64()),
            "x_nested": pa.array([[{"a": b"1"}], None, [], [{"a": None}]]),
            "x_money": pa.array([Decimal("1.25"), None, None, None], pa.decimal128(10, 2)),
        }
    )
    write_results(LocalStore(tmp_path), "results", rows, x_values)
    table = pq.read_table(tmp_path / "results" / "part-00000.parquet")
    assert table.column_names == [*CONTRACT_COLUMNS, *x_values.column_names]
    assert table.select(x_values.column_names).equals(x_values)
    back = read_rows(LocalStore(tmp_path), "results", columns=CONTRACT_COLUMNS)
    assert [row["status"] for row in back] == ["rendered", "rejected", "failed", "skipped"]
    assert back[0]["tags"] == {"scene": "sea"}
    assert back[0]["started_at"].tzinfo is not None
    assert (back[1]["num_frames"], back[1]["width"], back[1]["tags"]) == (None, None, {"1": "2"})
    assert back[2]["error_message"] == "went wrong"
    assert (back[3]["cost_usd"], back[3]["rendered_by_run"]) == (0.0, "run-1")


def test_an_empty_results_table_still_has_its_columns(tmp_path: Path) -> None:
    write_results(LocalStore(tmp_path), "results", [], pa.table({}))
    assert pq.read_schema(tmp_path / "results" / "part-00000.parquet").names == CONTRACT_COLUMNS


def spans(entries: list[LedgerEntry]) -> list[tuple[str, float, float]]:
    return [(e.state, e.t0_ns / S, e.t1_ns / S) for e in entries]


def test_a_flush_shows_running_entries_up_to_now_and_the_next_one_replaces_them(tmp_path: Path) -> None:
    table = LedgerTable(LocalStore(tmp_path), "runs/run-1/ledger")
    table.flush([entry("weight_load", 0, 2)])
    assert spans(read_ledger(LocalStore(tmp_path), "run-1")) == [("weight_load", 0, 2)]
    table.add([entry("weight_load", 0, 3)])
    table.flush([entry("denoise", 3, 4, "a", 1)])
    assert spans(read_ledger(LocalStore(tmp_path), "run-1")) == [("weight_load", 0, 3), ("denoise", 3, 4)]


def test_a_ledger_of_many_files_stays_a_partition_with_its_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LEDGER_FILE_ENTRIES", 2)
    table = LedgerTable(LocalStore(tmp_path), "runs/run-1/ledger")
    t = 0
    for state in ("provisioning", "weight_load", "denoise", "decode", "idle", "denoise", "teardown"):
        # Each entry is flushed twice while it runs, so that file borders fall inside entries.
        table.flush([entry(state, t, t + 1)])
        table.flush([entry(state, t, t + 2)])
        table.add([entry(state, t, t + 3)])
        t += 3
    table.flush()
    entries = read_ledger(LocalStore(tmp_path), "run-1")
    assert len(list((tmp_path / "runs" / "run-1" / "ledger").iterdir())) > 2
    assert entries[0].t0_ns == 0 and entries[-1].t1_ns == t * S
    assert all(a.t1_ns == b.t0_ns for a, b in pairwise(entries))
    assert sum(e.cost_usd for e in entries) == t


def test_a_torn_table_is_named(tmp_path: Path) -> None:
    LocalStore(tmp_path).write("results/part-00000.parquet", b"PAR1")
    with pytest.raises(UsageError, match="must be readable Parquet"):
        read_rows(LocalStore(tmp_path), "results")


def test_a_missing_table_is_empty(tmp_path: Path) -> None:
    empty: list[Any] = read_rows(LocalStore(tmp_path), "absent")
    assert empty == []


def test_results_are_written_as_they_come_in_files_and_row_groups_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS_FILE_ROWS", 20)
    monkeypatch.setattr(tables, "RESULTS_GROUP_ROWS", 5)
    made: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(52):
            made.append(index)
            yield rejected_row({"id": f"r{index}"}, index, "bad", FACTS)

    seen: list[int] = []
    store = LocalStore(tmp_path)
    write = store.write
    monkeypatch.setattr(store, "write", lambda name, content: (seen.append(len(made)), write(name, content)))
    write_results(store, "results", rows(), pa.table({"x_n": pa.chunked_array([range(30), range(30, 52)])}))
    assert seen == [20, 40, 52]
    files = sorted((tmp_path / "results").iterdir())
    assert [pq.ParquetFile(file).metadata.num_row_groups for file in files] == [4, 4, 3]
    back = read_rows(store, "results", columns=["id", "x_n"])
    assert back == [{"id": f"r{index}", "x_n": index} for index in range(52)]
