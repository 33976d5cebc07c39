"""Prompt manifests: Parquet files, folders or globs on any fsspec store, read as plain rows.

Checks the columns before any row: names, and types from which every value can be had without loss. Whether a row
makes sense is not decided here (`records.request`).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from pipeline.errors import UsageError
from pipeline.storage.filesystem import expand, open_for_reading

BATCH_ROWS = 10_000
REQUIRED = ("id", "prompt")


def _is_text(t: pa.DataType) -> bool:
    return bool(pt.is_string(t) or pt.is_large_string(t) or pt.is_string_view(t))


def _is_number(t: pa.DataType) -> bool:
    return bool(pt.is_integer(t) or pt.is_floating(t) or pt.is_decimal(t))


def _is_list(t: pa.DataType) -> bool:
    return bool(pt.is_list(t) or pt.is_large_list(t))


def _is_record(t: pa.DataType) -> bool:
    return bool(pt.is_struct(t) or pt.is_map(t))


# Column -> the type that is meant, and the test for types that can stand for it (README, "The contract").
COLUMNS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "id": ("string", _is_text),
    "prompt": ("string", _is_text),
    "negative_prompt": ("string", _is_text),
    "seed": ("int64", _is_number),
    "width": ("int32", _is_number),
    "height": ("int32", _is_number),
    "num_frames": ("int32", _is_number),
    "duration_s": ("double", _is_number),
    "fps": ("double", _is_number),
    "images": ("list<struct<uri, frame, strength>>", _is_list),
    "audio": ("struct<uri, strength>", _is_record),
    "video": ("struct<uri, mode, start_s, end_s, strength>", _is_record),
    "loras": ("list<struct<uri, strength>>", _is_list),
    "camera": ("string", _is_text),
    "scenes": ("list<struct<start_s, prompt>>", _is_list),
    "enhance_prompt": ("bool", pt.is_boolean),
    "num_steps": ("int32", _is_number),
    "cfg_scale": ("double", _is_number),
    "stg_scale": ("double", _is_number),
    "recipe": ("string", _is_text),
    "priority": ("int32", _is_number),
    "tags": ("map<string, string>", _is_record),
}


@dataclass(frozen=True)
class Manifest:
    """A manifest whose columns are known to be good. `sha256` covers the bytes of all its files in order."""

    uri: str
    files: tuple[str, ...]
    num_rows: int
    sha256: str
    x_columns: tuple[pa.Field, ...]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in order, without `x_` columns: files by sorted path, rows as stored. UsageError if one is torn."""
        for file in self.files:
            with open_for_reading(file) as stream, _readable(file):
                parquet = pq.ParquetFile(stream)
                known = [name for name in parquet.schema_arrow.names if name in COLUMNS]
                for batch in parquet.iter_batches(BATCH_ROWS, columns=known):
                    yield from _plain(batch).to_pylist(maps_as_pydicts=None)

    def x_values(self) -> pa.Table:
        """The `x_` columns of all rows, as stored: they are carried through and never looked at."""
        schema = pa.schema(self.x_columns)
        tables = []
        for file in self.files:
            with open_for_reading(file) as stream, _readable(file):
                parquet = pq.ParquetFile(stream)
                present = [name for name in schema.names if name in parquet.schema_arrow.names]
                table = parquet.read(present)
                for field in schema:
                    if field.name not in present:
                        table = table.append_column(field, pa.nulls(parquet.metadata.num_rows, field.type))
                tables.append(table.select(schema.names))
        return pa.concat_tables(tables) if schema.names else pa.table({})


@contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"manifest {file} must be readable to its end, got: {reason}; write it again") from error


def open_manifest(uri: str) -> Manifest:
    """Find the files of `uri` and check every file's columns; UsageError names the file, the column and the way out."""
    files = expand(uri, suffix=".parquet", what="manifest")
    digest = hashlib.sha256()
    num_rows = 0
    x_columns: dict[str, pa.Field] = {}
    for file in files:
        with open_for_reading(file) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
            stream.seek(0)
            try:
                parquet = pq.ParquetFile(stream)
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise UsageError(f"manifest must be Parquet, got {file}: {reason}; write it with pyarrow") from error
            _check_columns(file, parquet.schema_arrow)
            num_rows += parquet.metadata.num_rows
            for column in parquet.schema_arrow:
                if column.name.startswith("x_"):
                    first = x_columns.setdefault(column.name, column.remove_metadata().with_nullable(True))
                    if first.type != column.type:
                        raise UsageError(
                            f"manifest column {column.name} must have one type in all files, got {first.type} "
                            f"and {column.type} in {file}; write the files with one schema"
                        )
    return Manifest(uri, tuple(files), num_rows, digest.hexdigest(), tuple(x_columns.values()))


def write_manifest(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` (columns by name, the same in each) as a manifest on a local disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def _check_columns(file: str, schema: pa.Schema) -> None:
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"manifest columns must have different names, got {name} twice in {file}; rename one")
    for name in REQUIRED:
        if name not in names:
            raise UsageError(f"manifest must have a column {name}, got {', '.join(names) or 'none'} in {file}; add it")
    for column in schema:
        if column.name.startswith("x_"):
            continue
        if column.name not in COLUMNS:
            near = difflib.get_close_matches(column.name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"carry it through by naming it x_{column.name}"
            raise UsageError(f"manifest column {column.name} in {file} is unknown; {hint}")
        meant, fits = COLUMNS[column.name]
        kind = column.type.value_type if pt.is_dictionary(column.type) else column.type
        if not (fits(kind) or pt.is_null(kind)):
            raise UsageError(
                f"manifest column {column.name} must be {meant}, got {column.type} in {file}; cast the column"
            )


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Float32 as the double a person wrote: 29.97 would otherwise read back as 29.969999."""
    columns = []
    for column in batch.columns:
        if pt.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pt.is_float32(column.type):
            column = column.cast(pa.string()).cast(pa.float64())
        elif pt.is_float16(column.type):
            column = column.cast(pa.float64())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
