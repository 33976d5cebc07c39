"""What became of a row: timings, clip facts, the commit record, and the ledger entries that say where time went.

Values only. The `*_row` functions are the one place that knows how these become rows of the `results` table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from pipeline.records.request import tag_pairs
from pipeline.records.work import WorkItem

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
NS_PER_S = 1_000_000_000

# What a worker's device can be doing (README, "The contract"), grouped by how its time is charged.
COLD_START_STATES = ("provisioning", "weight_load", "warm_up")
CLIP_STATES = ("text_encode", "denoise", "upsample", "decode", "encode", "upload")
IDLE_STATES = ("wait", "idle", "drain", "teardown")
LEDGER_STATES = (*COLD_START_STATES, *CLIP_STATES, *IDLE_STATES, "failed", "unknown")


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One interval of one worker's held time: [t0_ns, t1_ns) in UTC nanoseconds, in one state."""

    run_id: str
    gpu_id: str
    node_id: str
    group_id: str
    rank: int
    state: str
    id: str | None
    attempt: int | None
    chunk: int | None
    t0_ns: int
    t1_ns: int
    price_id: str
    cost_usd: Decimal
    energy_j: float | None = None

    @property
    def gpu_seconds(self) -> float:
        return (self.t1_ns - self.t0_ns) / NS_PER_S


@dataclass(frozen=True, slots=True)
class WorkerSeat:
    """Who a worker is and since when it is held. `released_ns` is None while it is."""

    run_id: str
    gpu_id: str
    node_id: str
    group_id: str
    rank: int
    acquired_ns: int
    released_ns: int | None = None


def ledger_entry(
    seat: WorkerSeat,
    state: str,
    t0_ns: int,
    t1_ns: int,
    *,
    price_id: str,
    cost_usd: Decimal,
    id: str | None = None,
    attempt: int | None = None,
) -> LedgerEntry:
    """An interval of the worker in `seat`, for row `id` if it worked for one."""
    return LedgerEntry(
        run_id=seat.run_id,
        gpu_id=seat.gpu_id,
        node_id=seat.node_id,
        group_id=seat.group_id,
        rank=seat.rank,
        state=state,
        id=id,
        attempt=attempt,
        chunk=None,
        t0_ns=t0_ns,
        t1_ns=t1_ns,
        price_id=price_id,
        cost_usd=cost_usd,
    )


@dataclass(frozen=True, slots=True)
class ClipAsset:
    """A committed clip: where it is and what was read back from it."""

    uri: str
    thumbnail_uri: str
    sha256: str
    size_bytes: int
    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    has_audio: bool
    sample_rate_hz: int | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of an attempt. `encode_s` is host time that overlaps `decode_s`, so the parts may exceed `wall_s`."""

    queued_s: float = 0.0
    text_encode_s: float = 0.0
    denoise_s: float = 0.0
    upsample_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    upload_s: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rendered:
    """A clip that is committed. `adopted_from` and `adopted_attempt` name the run and attempt whose record won, if it
    was not this one's.

    Peaks: of device memory in use during the attempt (None on CPU); of the worker's resident host memory since its
    start, which holds the weights it mapped while loading.
    """

    item: WorkItem
    asset: ClipAsset
    timings: Timings
    started_ns: int
    finished_ns: int
    # As it was given to the model: enhanced, if the row asked for that.
    prompt: str
    adopted_from: str | None = None
    adopted_attempt: int | None = None
    peak_gpu_memory_bytes: int | None = None
    peak_host_memory_bytes: int | None = None
    # The commit record, if the worker left it to the driver to commit.
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that gave no clip. `fault` is the class that the failure policy decides by."""

    item: WorkItem
    error_class: str
    error_message: str
    fault: str
    started_ns: int
    finished_ns: int


Outcome = Rendered | Failed


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What every row of one run shares in the results table."""

    run_id: str
    model: str
    model_fingerprint: str
    precision: str


def timestamp(at_ns: int) -> datetime:
    return datetime.fromtimestamp(at_ns // 1000 / 1_000_000, tz=UTC)


def commit_record(rendered: Rendered, entries: tuple[LedgerEntry, ...], facts: RunFacts) -> dict[str, Any]:
    """The commit record's JSON object: the whole outcome, so that results can be rebuilt from records alone.

    `entries` are the leader's. Its followers work on the item as long as it does, so cost and GPU-seconds are its own
    times their number; the run's ledger has each rank's.
    """
    item = rendered.item
    row, num_gpus = rendered_row(rendered, facts), item.layout.num_gpus
    row["cost_usd"] = float(num_gpus * sum((entry.cost_usd for entry in entries), Decimal(0)))
    row["gpu_seconds"] = num_gpus * sum(entry.gpu_seconds for entry in entries)
    for name in ("started_at", "finished_at"):
        row[name] = row[name].isoformat()
    row["tags"] = dict(item.request.tags)
    return {
        "schema_version": SCHEMA_VERSION,
        "key": item.key,
        "run_id": facts.run_id,
        "attempt": item.attempt,
        **row,
        "ledger": [
            {"state": e.state, "t0_ns": e.t0_ns, "t1_ns": e.t1_ns, "gpu_id": e.gpu_id, "node_id": e.node_id,
             "price_id": e.price_id, "cost_usd": str(e.cost_usd)}
            for e in entries
        ],
    }  # fmt: skip


def asset_of(record: Mapping[str, Any]) -> ClipAsset:
    """The clip that a commit record names."""
    return ClipAsset(**{name: record[name] for name in ClipAsset.__slots__})


def adopting(rendered: Rendered, standing: Mapping[str, Any], run_id: str) -> Rendered:
    """What `rendered` is once the record `standing` stands: itself if that is its own, else its facts and our time."""
    if standing["run_id"] == run_id and standing["attempt"] == rendered.item.attempt:
        return rendered
    if standing["sha256"] != rendered.asset.sha256:
        log.warning(
            "another run committed other bytes for the same key; its clip stands",
            extra={"facts": {"key": rendered.item.key, "theirs": standing["sha256"], "ours": rendered.asset.sha256}},
        )
    return replace(
        rendered, asset=asset_of(standing), adopted_from=standing["run_id"], adopted_attempt=standing["attempt"]
    )


def item_row(item: WorkItem, facts: RunFacts, *, status: str) -> dict[str, Any]:
    """The results row of an item before anything has happened to it."""
    request = item.request
    columns = ("id", "prompt", "seed", "width", "height", "num_frames", "fps", "duration_s", "recipe")
    return {
        **_run_columns(request.row_index, facts, status=status),
        **{name: getattr(request, name) for name in columns},
        "tags": dict(request.tags),
        "content_key": item.key,
        "parallel": item.layout.name,
        "parallel_reason": item.layout_reason,
        "num_gpus": item.layout.num_gpus,
        "memory_rung": item.memory_rung,
        "estimated_gpu_seconds": item.estimate.gpu_seconds,
        "estimated_cost_usd": item.estimate.cost_usd,
    }


def _run_columns(row_index: int, facts: RunFacts, *, status: str) -> dict[str, Any]:
    """What every row holds whether or not it became a request: its place, its run, and that it has cost nothing yet."""
    return {
        "row_index": row_index,
        "status": status,
        "model": facts.model,
        "model_fingerprint": facts.model_fingerprint,
        "precision": facts.precision,
        "attempts": 0,
        "cost_usd": 0.0,
        "cost_loaded_usd": 0.0,
        "gpu_seconds": 0.0,
    }


def rendered_row(rendered: Rendered, facts: RunFacts) -> dict[str, Any]:
    asset, timings = rendered.asset, rendered.timings
    row = item_row(rendered.item, facts, status="rendered")
    row.update(_asset_columns(asset))
    row.update({name: getattr(timings, name) for name in Timings.__slots__})
    row.update(
        prompt=rendered.prompt,
        attempts=rendered.item.attempt,
        rendered_by_run=rendered.adopted_from or facts.run_id,
        peak_gpu_memory_bytes=rendered.peak_gpu_memory_bytes,
        peak_host_memory_bytes=rendered.peak_host_memory_bytes,
        started_at=timestamp(rendered.started_ns),
        finished_at=timestamp(rendered.finished_ns),
    )
    return row


def recovered_row(item: WorkItem, record: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """The row of a clip that this run committed with a worker that was lost before it could say so."""
    row = item_row(item, facts, status="rendered")
    row.update({name: record[name] for name in (*ClipAsset.__slots__, *Timings.__slots__, *_ATTEMPT_COLUMNS)})
    row.update(
        prompt=record["prompt"],
        attempts=record["attempt"],
        rendered_by_run=record["run_id"],
        peak_gpu_memory_bytes=record["peak_gpu_memory_bytes"],
        peak_host_memory_bytes=record.get("peak_host_memory_bytes"),
        **{name: datetime.fromisoformat(record[name]) for name in ("started_at", "finished_at")},
    )
    return row


def failed_row(failed: Failed, facts: RunFacts) -> dict[str, Any]:
    row = item_row(failed.item, facts, status="failed")
    row.update(
        attempts=failed.item.attempt,
        error_class=failed.error_class,
        error_message=failed.error_message,
        started_at=timestamp(failed.started_ns),
        finished_at=timestamp(failed.finished_ns),
    )
    return row


# How the attempt at a clip was made.
_ATTEMPT_COLUMNS = ("parallel", "parallel_reason", "num_gpus", "memory_rung")
# What a row that is there already takes from its commit record.
SKIPPED_COLUMNS = (
    "uri", "thumbnail_uri", "sha256", "size_bytes", "has_audio", "sample_rate_hz", "rendered_by_run", "prompt", "width",
    "height", "num_frames", "fps", "duration_s", *_ATTEMPT_COLUMNS,
)  # fmt: skip


def skipped_row(item: WorkItem, record: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """A row that is there already: the facts of its record, this run's identity of the row, cost 0."""
    row = item_row(item, facts, status="skipped")
    row.update({name: record[name] for name in SKIPPED_COLUMNS if name in record})
    return row


def rejected_row(row: Mapping[str, Any], row_index: int, message: str, facts: RunFacts) -> dict[str, Any]:
    """A row that never became a request: what it asked for where that makes sense, and every problem."""
    plain = ("id", "prompt", "seed", "width", "height", "num_frames", "fps", "duration_s", "recipe")
    return {
        **_run_columns(row_index, facts, status="rejected"),
        **{name: row.get(name) for name in plain},
        "tags": dict(tag_pairs(row.get("tags"))),
        "error_class": "InvalidRequest",
        "error_message": message,
    }


def _asset_columns(asset: ClipAsset) -> dict[str, Any]:
    return {name: getattr(asset, name) for name in ClipAsset.__slots__}
