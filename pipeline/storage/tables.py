"""The tables of a run as Parquet: `results`, one row a manifest row, and `ledger`, one row an interval.

The schemas are public (README, "The contract"). Only the driver writes; files are replaced whole, so a reader sees a
table before or after a change, never within one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from decimal import Decimal
from itertools import count, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.records.outcome import LedgerEntry
from pipeline.storage.store import Store

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
        ("peak_host_memory_bytes", pa.int64()),
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
# Rows of results are dicts of 3 kB until their row group is written.
RESULTS_GROUP_ROWS = 5_000


def write_results(store: Store, folder: str, rows: Iterable[Mapping[str, Any]], x_values: pa.Table) -> None:
    """Write the results table: `rows` in the order of the manifest, and its `x_` columns row by row as they are.

    A row group of rows is held at a time. Values of rejected rows that do not fit their column are left out: writing
    never fails for what a row holds.
    """
    schema = pa.schema([*RESULTS_SCHEMA, *x_values.schema])
    groups = _in_groups(rows, RESULTS_GROUP_ROWS)
    for part in count():
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            num_groups = 0
            for group in islice(groups, RESULTS_FILE_ROWS // RESULTS_GROUP_ROWS):
                columns = [_column(group, field) for field in RESULTS_SCHEMA]
                indices = pa.array([row["row_index"] for row in group], pa.int64())
                writer.write_table(pa.table([*columns, *x_values.take(indices).columns], schema=schema))
                num_groups += 1
        if num_groups or part == 0:
            store.write(f"{folder}/part-{part:05d}.parquet", sink.getvalue())
        if num_groups < RESULTS_FILE_ROWS // RESULTS_GROUP_ROWS:
            return


def _in_groups(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    left = iter(rows)
    while group := list(islice(left, size)):
        yield group


def _column(rows: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    try:
        # Most fit as they are. Arrow takes no dict for a map, and would cut 1.5 to 1 for a whole number.
        if not (pa.types.is_map(field.type) or pa.types.is_integer(field.type)):
            return pa.array(values, type=field.type)
    except (pa.ArrowException, OverflowError, TypeError):
        pass
    values = [_fitting(value, field.type) for value in values]
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowException, OverflowError, TypeError):
        return pa.concat_arrays([_single(value, field.type) for value in values])


def _single(value: Any, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array([value], type=kind)
    except (pa.ArrowException, OverflowError, TypeError):
        return pa.nulls(1, kind)


def _fitting(value: Any, kind: pa.DataType) -> Any:
    """The value in the Python type that its column takes; None for a number that is not whole where it must be."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        return list(dict(value).items())
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_integer(kind):
        return int(value) if value % 1 == 0 else None
    return value


def _write(store: Store, name: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.write(name, sink.getvalue())


class LedgerTable:
    """The ledger of one run: closed entries are kept, running ones are shown as if they ended at the last flush.

    Rewriting the newest file instead of adding one for each flush keeps a night's ledger at a few dozen files.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder
        self._part = 0
        self._entries: list[LedgerEntry] = []
        # What a finished file already holds of entries that were running when it was finished, by worker and start.
        self._shown: dict[tuple[str, str, int], LedgerEntry] = {}

    def add(self, entries: Iterable[LedgerEntry]) -> None:
        self._entries.extend(self._remainders(entries, forget=True))

    def flush(self, running: Sequence[LedgerEntry] = ()) -> None:
        """Make everything added so far, and the running entries up to now, readable in one atomic write."""
        running = self._remainders(running, forget=False)
        entries = [*self._entries, *running]
        if not entries:
            return
        _write(self._store, f"{self._folder}/part-{self._part:05d}.parquet", ledger_table(entries))
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


def write_ledger_file(store: Store, name: str, entries: Sequence[LedgerEntry]) -> None:
    """Add one file to a ledger, for entries that its own run could not write."""
    _write(store, name, ledger_table(entries))


def iter_rows(
    store: Store, folder: str, columns: Sequence[str] | None = None, *, without: str = ""
) -> Iterator[dict[str, Any]]:
    """The rows of a table's folder in file order (only `columns` if given), maps as dicts, a row group at a time.

    No row if the folder is absent; UsageError if a file in it is no readable Parquet. The file `without` is left out.
    """
    for name in sorted(store.sizes(folder)):
        if not name.endswith(".parquet") or name == without:
            continue
        try:
            file = pq.ParquetFile(io.BytesIO(store.read(f"{folder}/{name}") or b""))
            for batch in file.iter_batches(RESULTS_GROUP_ROWS, columns=columns):
                yield from batch.to_pylist(maps_as_pydicts="lossy")
        except (pa.ArrowException, OSError) as error:
            where = store.uri(f"{folder}/{name}")
            raise UsageError(f"{where} must be readable Parquet, got: {error}; remove it, records remain") from error


def read_rows(
    store: Store, folder: str, columns: Sequence[str] | None = None, *, without: str = ""
) -> list[dict[str, Any]]:
    """All rows of `iter_rows` at once, for tables that are small."""
    return list(iter_rows(store, folder, columns, without=without))


def read_ledger(store: Store, run_id: str, *, without: str = "") -> list[LedgerEntry]:
    """The ledger of a run as entries, oldest first; the file `without` is left out."""
    names = {f.name for f in fields(LedgerEntry)}
    rows = [
        {name: value for name, value in row.items() if name in names}
        for row in read_rows(store, f"runs/{run_id}/ledger", without=without)
    ]
    entries = [LedgerEntry(**{**row, "cost_usd": Decimal(row["cost_usd"])}) for row in rows]
    return sorted(entries, key=lambda entry: (entry.gpu_id, entry.t0_ns))
