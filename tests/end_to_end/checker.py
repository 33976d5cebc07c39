"""What a user can read of an output folder, checked against what the contract promises.

After any number of killed runs and one run that ended:
  1. every manifest row has exactly one result in each run that has any, in the last one `rendered` or `skipped`, and
     such a row says what its record says;
  2. every commit's video is there, has the recorded hash and decodes to its last frame;
  3. nothing that was committed was rendered again, by no run;
  4. each run's ledger partitions each worker's held time within 1 ms, with at most 5 s `unknown` a kill
     (of the driver, or of a worker);
  5. nothing is left in `_attempts`, and no file is there that no record names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import fsspec
import pyarrow.parquet as pq

MS = 1_000_000
MAX_UNKNOWN_NS = 5_000_000_000


def results_of(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "results").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist(maps_as_pydicts="lossy")]


def ledger_of(run: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((run / "ledger").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def runs_of(output: Path) -> list[Path]:
    return sorted((output / "runs").iterdir(), key=lambda run: json.loads((run / "run.json").read_text())["started_at"])


def records_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (output / "commits").glob("*.json")]


def events_of(run: Path) -> list[dict[str, Any]]:
    lines = [line for file in (run / "events").glob("*.jsonl") for line in file.read_text().splitlines()]
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:  # the line that a kill cut short
            continue
    return events


def download(bucket: str, target: Path) -> Path:
    """The bucket's output as a user would fetch it."""
    fsspec.filesystem("s3", use_listings_cache=False).get(f"{bucket}/out/", f"{target}/", recursive=True)
    return target


def check_report_opens(run: Path, num_videos: int) -> None:
    """The page links to `num_videos` videos that are there, wherever the output was moved to."""
    links = set(re.findall(r'"(\.\./\.\./videos/[^"]+)"', (run / "report.html").read_text()))
    assert len(links) == num_videos and all((run / link).is_file() for link in links), links


def check_output(output: Path, ids: list[str]) -> None:
    last = runs_of(output)[-1]
    results = results_of(last)
    assert [row["id"] for row in results] == ids
    assert {row["status"] for row in results} <= {"rendered", "skipped"}
    check_commits(output)
    check_nothing_was_done_twice(output)
    for run in runs_of(output):
        check_results(run, ids, records_of(output))
        check_partition(run)
    assert not (output / "_attempts").exists()


def check_results(run: Path, ids: list[str], records: list[dict[str, Any]]) -> None:
    """A run that was killed has none; any other has each row once, and done ones name the clip that is there."""
    rows, by_key = results_of(run), {record["key"]: record for record in records}
    assert not rows or sorted(row["id"] for row in rows) == sorted(ids), run.name
    for row in rows:
        if row["status"] in ("rendered", "skipped"):
            assert facts_of_clip(row) == facts_of_clip(by_key[row["content_key"]]), f"{row['id']} of {run.name}"


def facts_of_clip(row: dict[str, Any]) -> tuple[str, str, int]:
    return Path(row["uri"]).name, row["sha256"], row["size_bytes"]


def check_commits(output: Path) -> None:
    named: set[str] = set()
    thumbnails: set[str] = set()
    for record in records_of(output):
        video = output / "videos" / Path(record["uri"]).name
        assert hashlib.sha256(video.read_bytes()).hexdigest() == record["sha256"]
        assert video.stat().st_size == record["size_bytes"]
        assert decoded_frames(video) == record["num_frames"]
        named.add(video.name)
        thumbnails.add(Path(record["thumbnail_uri"]).name)
    assert {path.name for path in (output / "videos").iterdir()} == named
    assert {path.name for path in (output / "thumbnails").iterdir()} == thumbnails
    assert not list((output / "commits").glob("*.unreadable"))


def decoded_frames(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def check_nothing_was_done_twice(output: Path) -> None:
    """A device that begins to denoise for a row after its record was finished does again what is done.

    A record that was replaced no longer says that it was there, but the log of its run still does.
    """
    rendered_by: dict[str, str] = {}
    for run in runs_of(output):
        rows = [event["row"] for event in events_of(run) if event["event"] == "rendered"]
        for key in (row["content_key"] for row in rows if row["rendered_by_run"] == run.name):
            assert key not in rendered_by, f"{key} was rendered by {rendered_by[key]} and again by {run.name}"
            rendered_by[key] = run.name
    run_of_record = {record["key"]: record["run_id"] for record in records_of(output)}
    assert rendered_by == {key: run_of_record.get(key) for key in rendered_by}
    finished_ns = {
        record["id"]: datetime.fromisoformat(record["finished_at"]).timestamp() * 1e9 for record in records_of(output)
    }
    for run in runs_of(output):
        for row in ledger_of(run):
            if row["state"] == "denoise" and row["id"] in finished_ns:
                assert row["t0_ns"] <= finished_ns[row["id"]], f"{row['id']} was done twice"


def check_partition(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    by_worker: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in ledger_of(run):
        by_worker[row["gpu_id"]].append(row)
    assert set(by_worker) <= {worker["gpu_id"] for worker in facts["workers"]}
    for worker in facts["workers"]:
        rows = sorted(by_worker[worker["gpu_id"]], key=lambda row: row["t0_ns"])
        assert worker["released_ns"] is not None, f"{run.name} was never closed"
        assert abs(rows[0]["t0_ns"] - worker["acquired_ns"]) <= MS
        assert abs(rows[-1]["t1_ns"] - worker["released_ns"]) <= MS
        assert all(abs(a["t1_ns"] - b["t0_ns"]) <= MS for a, b in pairwise(rows)), f"{run.name} has a gap or an overlap"
        unknown = [row for row in rows if row["state"] == "unknown"]
        assert sum(row["t1_ns"] - row["t0_ns"] for row in unknown) <= MAX_UNKNOWN_NS
        assert not unknown or facts["state"] == "lost" or any(e["event"] == "worker_lost" for e in events_of(run))
