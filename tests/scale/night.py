"""A long manifest and the output of a killed run that has rendered every other row of it, written without rendering.

Videos are a few bytes long, as their records say; a record that the index holds is an empty file, because a resume
looks at its name only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.entry import RenderJob, compose_job, compose_recipes
from pipeline.assembly.driver_side import planner
from pipeline.records.outcome import (
    CLIP_STATES,
    ClipAsset,
    LedgerEntry,
    Rendered,
    RunFacts,
    Timings,
    commit_record,
)
from pipeline.records.work import WorkItem
from pipeline.storage.assets import INDEX_EVERY_RECORDS, AssetStore
from pipeline.storage.local_store import LocalStore
from pipeline.storage.manifest import open_manifest

SIZES = ((1920, 1080), (1280, 704), (768, 512), (512, 768))
LENGTHS = (49, 97, 121)
SCENERY = "a slow dolly shot through fog over a harbour at dawn, gulls crying, ropes creaking, low sun on wet planks"
FACTS = RunFacts("20261119T210000-aaaaaa", "nano", "f" * 64, "exact")
VIDEO = b"video"
BATCH = 20_000


@dataclass(frozen=True)
class Night:
    """Where everything lies; `arguments` are those of `jobs.render`."""

    folder: Path
    num_rows: int
    num_newer: int

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def num_done(self) -> int:
        return self.num_rows // 2

    @property
    def arguments(self) -> list[str]:
        return [f"manifest={self.folder / 'manifest.parquet'}", f"output={self.output}",
                f"model.folder={self.folder / 'models'}"]  # fmt: skip


def make_night(folder: Path, num_rows: int, num_newer: int) -> Night:
    """Every other row is done; of the last `num_newer` of them the index has no record."""
    night = Night(folder, num_rows, num_newer)
    models = folder / "models"
    models.mkdir(parents=True)
    sidecar = {"model": "nano", "fingerprint": FACTS.model_fingerprint, "files": {}}
    (models / "fingerprint.nano.json").write_text(json.dumps(sidecar))
    _write_manifest(folder / "manifest.parquet", num_rows)
    for name in ("commits/index", "videos", "thumbnails"):
        (night.output / name).mkdir(parents=True)
    _write_commits(night)
    return night


def _write_manifest(path: Path, num_rows: int) -> None:
    writer = None
    for start in range(0, num_rows, BATCH):
        table = pa.Table.from_pylist([_row(i) for i in range(start, min(num_rows, start + BATCH))], _SCHEMA)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


_SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64()), ("width", pa.int32()), ("height", pa.int32()),
     ("num_frames", pa.int32()), ("fps", pa.float64()), ("priority", pa.int32()),
     ("tags", pa.map_(pa.string(), pa.string())), ("x_take", pa.int64())]
)  # fmt: skip


def _row(index: int) -> dict[str, Any]:
    width, height = SIZES[index % len(SIZES)]
    return {"id": f"shot-{index:07d}", "prompt": f"take {index}: {SCENERY}", "seed": index if index % 3 else None,
            "width": width, "height": height, "num_frames": LENGTHS[index % len(LENGTHS)], "fps": 24.0,
            "priority": index % 2, "tags": [("scene", f"{index // 100}")], "x_take": index}  # fmt: skip


def _write_commits(night: Night) -> None:
    assets = AssetStore(LocalStore(night.output))
    texts: dict[str, bytes] = {}
    part = 0
    for number, item in enumerate(_done_items(night)):
        text = _record_text(assets, item)
        newer = number >= night.num_done - night.num_newer
        _create(f"{night.output}/commits/{item.key}.json", text if newer else b"")
        _create(f"{night.output}/videos/{item.file_stem}.mp4", VIDEO)
        if not newer:
            texts[item.key] = text
        if texts and (len(texts) == INDEX_EVERY_RECORDS or number == night.num_done - night.num_newer - 1):
            assets._write_index(f"commits/index/{FACTS.run_id}-{part:05d}.parquet", texts)
            texts, part = {}, part + 1


def _create(path: str, content: bytes) -> None:
    """A third of the time that `Path.write_bytes` takes, a million times."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    if content:
        os.write(descriptor, content)
    os.close(descriptor)


def _done_items(night: Night) -> Iterator[WorkItem]:
    job = compose_job(RenderJob, "render", night.arguments)
    planning = planner(job, compose_recipes("render", night.arguments), FACTS.model_fingerprint)
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(open_manifest(job.manifest).rows()):
        if number % 2 == 0:
            rows.append(row)
        if len(rows) == BATCH or number == night.num_rows - 1:
            yield from (planning.item(request) for request in planning.intake(rows).requests)
            rows = []


def _record_text(assets: AssetStore, item: WorkItem) -> bytes:
    """As `AssetStore.commit` writes it: the facts of one clip, with what differs put in."""
    request, store = item.request, assets.store
    own = {"key": item.key, "content_key": item.key, "id": request.id, "prompt": request.prompt,
           "seed": request.seed, "uri": store.uri(f"videos/{item.file_stem}.mp4"),
           "thumbnail_uri": store.uri(f"thumbnails/{item.file_stem}.jpg"), "sha256": item.key[::-1]}  # fmt: skip
    text = _template(item)
    for name, value in own.items():
        text = text.replace(f'"@{name}"', json.dumps(value))
    return text.encode()


_templates: dict[tuple[int, int, int], str] = {}


def _template(item: WorkItem) -> str:
    request = item.request
    shape = (request.width, request.height, request.num_frames)
    if shape not in _templates:
        stem = "@"
        asset = ClipAsset(stem, stem, stem, len(VIDEO), *shape, request.fps, request.duration_s, True, 24000)
        timings = Timings(*(0.1234567891234 * number for number in range(8)))
        rendered = Rendered(item, asset, timings, 10**18, 10**18 + 10**10, request.prompt)
        entries = [
            LedgerEntry(FACTS.run_id, "cuda-0", "node-17", "group-0", 0, state, request.id, 1, None, 10**18 + n * 10**9,
                        10**18 + (n + 1) * 10**9, "aws_p5", Decimal("0.00123456789012"))
            for n, state in enumerate(CLIP_STATES)
        ]  # fmt: skip
        record = commit_record(rendered, tuple(entries), FACTS)
        record |= {name: f"@{name}" for name in ("key", "content_key", "id", "prompt", "seed", "uri", "thumbnail_uri",
                                                 "sha256")}  # fmt: skip
        _templates[shape] = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1)
    return _templates[shape]
