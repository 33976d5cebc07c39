"""The tables of a run as Parquet: `results`, one row a manifest row, and `ledger`, one row an interval.

The schemas are public (README, "The contract"). Only the driver writes; files are replaced whole, so a reader sees a
table before or after a change, never within one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.records.outcome import LedgerEntry
from pipeline.storage.filesystem import write_atomically

_UTC = pa.timestamp("us", tz="UTC")
_MONEY = pa.decimal128(38, 14)

RESULTS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row_index", pa.int64()),
        ("status", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("size_bytes", pa.int64()),
        ("thumbnail_uri", pa.string()),
        ("content_key", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("duration_s", pa.float64()),
        ("has_audio", pa.bool_()),
        ("sample_rate_hz", pa.int32()),
        ("recipe", pa.string()),
        ("model", pa.string()),
        ("model_fingerprint", pa.string()),
        ("precision", pa.string()),
        ("parallel", pa.string()),
        ("parallel_reason", pa.string()),
        ("num_gpus", pa.int32()),
        ("attempts", pa.int32()),
        ("memory_rung", pa.string()),
        ("error_class", pa.string()),
        ("error_message", pa.string()),
        ("rendered_by_run", pa.string()),
        *((name, pa.float64()) for name in (
            "queued_s", "text_encode_s", "denoise_s", "upsample_s", "decode_s", "encode_s", "upload_s", "wall_s",
            "gpu_seconds",
        )),
        ("peak_gpu_memory_bytes", pa.int64()),
        *((name, pa.float64()) for name in (
            "energy_j", "cost_usd", "cost_loaded_usd", "estimated_gpu_seconds", "estimated_cost_usd",
        )),
        ("started_at", _UTC),
        ("finished_at", _UTC),
        ("tags", pa.map_(pa.string(), pa.string())),
    ]
)  # fmt: skip

LEDGER_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("gpu_id", pa.string()),
        ("node_id", pa.string()),
        ("group_id", pa.string()),
        ("rank", pa.int32()),
        ("state", pa.string()),
        ("id", pa.string()),
        ("attempt", pa.int32()),
        ("chunk", pa.int32()),
        ("t0_ns", pa.int64()),
        ("t1_ns", pa.int64()),
        ("gpu_seconds", pa.float64()),
        ("energy_j", pa.float64()),
        ("price_id", pa.string()),
        ("cost_usd", _MONEY),
    ]
)

# A ledger file is rewritten while it grows; past this many entries a new one is begun.
LEDGER_FILE_ENTRIES = 2_000
RESULTS_FILE_ROWS = 50_000
_INT32 = range(-(2**31), 2**31)
_INT64 = range(-(2**63), 2**63)


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]], x_columns: Mapping[str, pa.DataType]) -> None:
    """Write the results table. Values of rejected rows that do not fit their column are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = RESULTS_SCHEMA
    for name, kind in x_columns.items():
        schema = schema.append(pa.field(name, kind))
    for part, start in enumerate(range(0, max(1, len(rows)), RESULTS_FILE_ROWS)):
        chunk = rows[start : start + RESULTS_FILE_ROWS]
        columns = [pa.array([_fitting(row.get(f.name), f.type) for row in chunk], type=f.type) for f in schema]
        _write(folder / f"part-{part:05d}.parquet", pa.Table.from_arrays(columns, schema=schema))


def _fitting(value: Any, kind: pa.DataType) -> Any:
    """The value as its column can hold it: maps as pairs, numbers beyond the type as null."""
    if value is None or pa.types.is_map(kind):
        return None if value is None else list(dict(value).items())
    if pa.types.is_integer(kind):
        if isinstance(value, float) and not value.is_integer():
            return None
        return int(value) if int(value) in (_INT32 if kind == pa.int32() else _INT64) else None
    return value


def _write(path: Path, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue())


class LedgerTable:
    """The ledger of one run: closed entries are kept, running ones are shown as if they ended at the last flush.

    Rewriting the newest file instead of adding one for each flush keeps a night's ledger at a few dozen files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._part = 0
        self._entries: list[LedgerEntry] = []
        # What a finished file already holds of entries that were running when it was finished, by worker and start.
        self._shown: dict[tuple[str, str, int], LedgerEntry] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, entries: Iterable[LedgerEntry]) -> None:
        self._entries.extend(self._remainders(entries, forget=True))

    def flush(self, running: Sequence[LedgerEntry] = ()) -> None:
        """Make everything added so far, and the running entries up to now, readable in one atomic write."""
        running = self._remainders(running, forget=False)
        entries = [*self._entries, *running]
        if not entries:
            return
        _write(self._folder / f"part-{self._part:05d}.parquet", ledger_table(entries))
        if len(self._entries) >= LEDGER_FILE_ENTRIES:
            self._part += 1
            self._entries = []
            self._shown.update({(e.node_id, e.gpu_id, e.t1_ns): e for e in running})

    def _remainders(self, entries: Iterable[LedgerEntry], *, forget: bool) -> list[LedgerEntry]:
        """The entries without what finished files hold of them, and without empty ones."""
        left = []
        for entry in entries:
            for key, shown in list(self._shown.items()):
                if key[:2] == (entry.node_id, entry.gpu_id) and entry.t0_ns <= shown.t0_ns < entry.t1_ns:
                    entry = replace(entry, t0_ns=shown.t1_ns, cost_usd=entry.cost_usd - shown.cost_usd)
                    if forget:
                        del self._shown[key]
            if entry.t1_ns > entry.t0_ns:
                left.append(entry)
        return left


def ledger_table(entries: Sequence[LedgerEntry]) -> pa.Table:
    columns = [pa.array([getattr(entry, f.name) for entry in entries], type=f.type) for f in LEDGER_SCHEMA]
    return pa.Table.from_arrays(columns, schema=LEDGER_SCHEMA)


def write_ledger_file(path: Path, entries: Sequence[LedgerEntry]) -> None:
    """Add one file to a ledger, for entries that its own run could not write."""
    _write(path, ledger_table(entries))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a table's folder in file order, maps as dicts; an absent folder is an empty table."""
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{file} must be readable Parquet, got: {error}; rebuild it from the commits") from error
        rows.extend(table.to_pylist(maps_as_pydicts="lossy"))
    return rows


def read_ledger(folder: Path) -> list[LedgerEntry]:
    """The ledger of a run as entries, oldest first."""
    names = {f.name for f in fields(LedgerEntry)}
    rows = [{name: value for name, value in row.items() if name in names} for row in read_rows(folder)]
    entries = [LedgerEntry(**{**row, "cost_usd": Decimal(row["cost_usd"])}) for row in rows]
    return sorted(entries, key=lambda entry: (entry.gpu_id, entry.t0_ns))
