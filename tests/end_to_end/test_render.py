"""A manifest becomes clips with sound, once, and its tables say so."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.end_to_end.checker import (
    check_commits,
    check_output,
    check_partition,
    events_of,
    ledger_of,
    results_of,
    runs_of,
)
from tests.end_to_end.conftest import CLIP, ROOT, Render, command, run_command, small_rows

Manifest = Callable[[list[dict[str, Any]]], Path]


def test_the_sample_manifest_gives_clips_with_sound_and_again_nothing(render: Render, tmp_path: Path) -> None:
    sample = ROOT / "conf" / "demo" / "prompts.parquet"
    done = render(sample)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(sample).to_pylist()
    out = tmp_path / "out"
    check_output(out, [row["id"] for row in rows])
    for row in results_of(runs_of(out)[0]):
        with av.open(row["uri"].removeprefix("file://")) as clip:
            video, audio = clip.streams.video[0], clip.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.start_time, audio.start_time) == (0, 0)
            assert (video.width, video.height) == (row["width"], row["height"])
            for stream in (video, audio):
                assert abs(stream.duration * stream.time_base - Fraction(row["duration_s"])) <= 1 / Fraction(row["fps"])
            assert audio.codec_context.sample_rate == row["sample_rate_hz"] == 24000
            assert audio.codec_context.layout.name == "stereo"
    page = (runs_of(out)[0] / "report.html").read_text()
    assert all(f"../../videos/{Path(row['uri']).name}" in page for row in results_of(runs_of(out)[0]))

    started_s = time.monotonic()
    again = render(sample)
    assert time.monotonic() - started_s < 15
    assert again.returncode == 0
    second = runs_of(out)[-1]
    assert {row["status"] for row in results_of(second)} == {"skipped"}
    assert ledger_of(second) == [], "nothing to render must load no model and hold no worker"
    assert all(row["cost_usd"] == 0 and row["rendered_by_run"] == runs_of(out)[0].name for row in results_of(second))


def test_bad_rows_are_rejected_with_every_problem_and_the_others_rendered(
    render: Render, manifest: Manifest, tmp_path: Path
) -> None:
    rows = small_rows(8)
    rows[1]["num_frames"] = 120
    rows[3].update(prompt="  ", width=63)
    rows[5]["fps"] = float("nan")
    rows[6]["images"] = [{"uri": "a.png", "frame": 0, "strength": 1.0}]
    done = render(manifest(rows))
    assert done.returncode == 3, done.stderr
    results = results_of(runs_of(tmp_path / "out")[0])
    assert [row["status"] for row in results] == [
        "rendered", "rejected", "rendered", "rejected", "rendered", "rejected", "rejected", "rendered",
    ]  # fmt: skip
    assert results[1]["error_message"] == 'row 1 (id "clip-1"): num_frames must be 8k+1, got 120; use 113 or 121'
    assert "prompt must not be blank" in results[3]["error_message"]
    assert "width must be even" in results[3]["error_message"]
    assert "fps must be a finite number" in results[5]["error_message"]
    assert "images is not supported by recipe distilled_two_stage" in results[6]["error_message"]
    assert all(message in done.stdout for message in ("rejected", "clip-1"))


def test_costs_of_rows_and_run_are_those_of_the_ledger(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    assert render(manifest(small_rows(3))).returncode == 0
    run = runs_of(tmp_path / "out")[0]
    ledger, results = ledger_of(run), results_of(run)
    total = sum((row["cost_usd"] for row in ledger), Decimal(0))
    totals = json.loads((run / "run.json").read_text())["totals"]
    assert totals["cost_usd"] == pytest.approx(float(total), rel=1e-9)
    assert sum(row["cost_loaded_usd"] for row in results) == pytest.approx(float(total), rel=1e-9)
    for row in results:
        own = sum((entry["cost_usd"] for entry in ledger if entry["id"] == row["id"]), Decimal(0))
        assert row["cost_usd"] == pytest.approx(float(own), rel=1e-9) and own > 0
    per_ns = Decimal("0.0816") / 3_600_000_000_000
    assert all(abs(row["cost_usd"] - (row["t1_ns"] - row["t0_ns"]) * per_ns) < Decimal("1e-13") for row in ledger)
    states = {row["state"] for row in ledger}
    assert {"provisioning", "weight_load", "text_encode", "denoise", "upsample", "decode", "encode", "upload"} <= states


def test_equal_rows_share_one_video(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    rows = [{"id": id, "prompt": "the same", "seed": 1, **CLIP} for id in ("a", "b")]
    assert render(manifest(rows)).returncode == 0
    first, second = results_of(runs_of(tmp_path / "out")[0])
    assert (first["status"], second["status"]) == ("rendered", "skipped")
    assert first["uri"] == second["uri"] and first["content_key"] == second["content_key"]
    assert len(list((tmp_path / "out" / "videos").iterdir())) == 1


def test_an_edited_prompt_is_rendered_again_and_only_that(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    rows = small_rows(2)
    assert render(manifest(rows)).returncode == 0
    rows[1]["prompt"] = "something else"
    assert render(manifest(rows)).returncode == 0
    assert [row["status"] for row in results_of(runs_of(tmp_path / "out")[-1])] == ["skipped", "rendered"]


def test_a_lost_video_is_rendered_again_to_the_same_bytes(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    assert render(manifest(small_rows(1))).returncode == 0
    (video,) = (tmp_path / "out" / "videos").iterdir()
    before = video.read_bytes()
    video.unlink()
    assert render(manifest(small_rows(1))).returncode == 0
    assert video.read_bytes() == before


def test_without_resume_a_committed_row_comes_out_the_same(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    assert render(manifest(small_rows(1))).returncode == 0
    done = render(manifest(small_rows(1)), "resume=false")
    assert done.returncode == 0
    first, second = (results_of(run)[0] for run in runs_of(tmp_path / "out"))
    assert second["status"] == "rendered" and second["sha256"] == first["sha256"]
    assert "other bytes" not in done.stderr


def test_ids_and_limit_leave_the_rest_not_started(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    done = render(manifest(small_rows(4)), "ids=[clip-0,clip-2,clip-3]", "limit=1")
    assert done.returncode == 0
    statuses = [row["status"] for row in results_of(runs_of(tmp_path / "out")[0])]
    assert statuses == ["rendered", "not_started", "not_started", "not_started"]


@pytest.mark.parametrize("limit", ["budget_usd=0.0000000001", "deadline=2020-01-01T00:00:00"])
def test_a_budget_or_deadline_stops_before_the_next_clip(
    render: Render, manifest: Manifest, tmp_path: Path, limit: str
) -> None:
    done = render(manifest(small_rows(2)), limit)
    assert done.returncode == 4
    run = runs_of(tmp_path / "out")[0]
    assert {row["status"] for row in results_of(run)} == {"not_started"}
    assert ledger_of(run) == [], "a job that may start nothing must not load the model"


def test_a_dry_run_and_an_estimate_say_the_same_and_write_nothing(
    render: Render, manifest: Manifest, tmp_path: Path
) -> None:
    rows = small_rows(3)
    rows[1]["num_frames"] = 120
    path = manifest(rows)
    dry = render(path, "dry_run=true")
    report = tmp_path / "estimate.json"
    estimate = render(path, f"report={report}", job="estimate")
    assert (dry.returncode, estimate.returncode) == (3, 3)
    assert dry.stdout == estimate.stdout
    assert not (tmp_path / "out").exists()
    facts = json.loads(report.read_text())
    assert (facts["to_render"], facts["rejected"], facts["source"]) == (2, 1, "uncalibrated")
    assert "use 113 or 121" in facts["rejections"][0]


def test_a_report_is_rebuilt_from_the_runs_tables(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    assert render(manifest(small_rows(1))).returncode == 0
    run = runs_of(tmp_path / "out")[0]
    page = run / "report.html"
    before = page.read_text()
    page.unlink()

    done = run_command("report", f"run={run}", "follow=true")
    assert done.returncode == 0, done.stderr
    assert page.read_text() == before


def test_every_event_is_a_json_line(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    assert render(manifest(small_rows(1))).returncode == 0
    events = [event["event"] for event in events_of(runs_of(tmp_path / "out")[0])]
    assert events == ["attempt_started", "rendered", "ended"]


def test_a_relative_output_with_spaces_is_a_folder_like_any_other(
    model_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    relative = os.path.relpath(tmp_path / "my out", ROOT)
    arguments = (f"manifest={manifest(small_rows(1))}", f"output={relative}", f"model.folder={model_folder}")
    done = run_command("render", *arguments)
    assert done.returncode == 0, done.stderr
    check_output(tmp_path / "my out", ["clip-0"])
    (row,) = results_of(runs_of(tmp_path / "my out")[0])
    assert row["uri"] == (tmp_path / "my out" / "videos" / Path(row["uri"]).name).as_uri()


def test_x_columns_of_any_type_come_through_as_they_were(render: Render, tmp_path: Path) -> None:
    rows = small_rows(2)
    table = pa.table(
        {
            **{name: [row[name] for row in rows] for name in rows[0]},
            "x_at": pa.array([1, None], pa.timestamp("ns")),
            "x_raw": pa.array([b"\xff", b""]),
            "x_shots": pa.array([[{"n": 1}], None]),
        }
    )
    path = tmp_path / "manifest.parquet"
    pq.write_table(table, path)
    done = render(path)
    assert done.returncode == 0, done.stderr
    results = pq.read_table(next((runs_of(tmp_path / "out")[0] / "results").glob("*.parquet")))
    for name in ("x_at", "x_raw", "x_shots"):
        assert results.column(name).equals(table.column(name))


def test_an_empty_manifest_is_a_finished_run(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}), path)
    done = render(path)
    assert done.returncode == 0, done.stderr
    assert results_of(runs_of(tmp_path / "out")[0]) == []


def test_a_run_whose_output_nobody_reads_any_more_goes_on(
    model_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    arguments = (f"manifest={manifest(small_rows(3))}", f"output={tmp_path / 'out'}", f"model.folder={model_folder}")
    process = subprocess.Popen(
        command("render", *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 0
    check_output(tmp_path / "out", ["clip-0", "clip-1", "clip-2"])


def test_two_renders_at_once_into_one_output_make_each_clip_once(
    model_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    arguments = (f"manifest={manifest(small_rows(6))}", f"output={tmp_path / 'out'}", f"model.folder={model_folder}")
    both = [subprocess.Popen(command("render", *arguments), cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    output = tmp_path / "out"
    check_commits(output)
    assert len(list((output / "videos").iterdir())) == 6
    for run in runs_of(output):
        check_partition(run)
        assert {row["status"] for row in results_of(run)} <= {"rendered", "skipped"}


def test_the_nano_model_is_built_beside_what_a_folder_holds(manifest: Manifest, tmp_path: Path) -> None:
    """`model.folder=` without `model=` must not cost anybody their weights."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "ltx.safetensors").write_text("somebody's weights")
    arguments = (f"manifest={manifest(small_rows(1))}", f"output={tmp_path / 'out'}", f"model.folder={folder}")
    assert run_command("render", *arguments, "dry_run=true").returncode == 0
    assert [path.name for path in folder.iterdir()] == ["ltx.safetensors"], "a dry run writes nothing"
    assert run_command("render", *arguments).returncode == 0
    assert (folder / "ltx.safetensors").read_text() == "somebody's weights"


def test_the_fast_tier_renders_and_says_so(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    """The nano model's two layers are both float8 and sparse, in both stages."""
    rows = manifest([{"id": "fast", "prompt": "a lighthouse", "width": 384, "height": 256, "num_frames": 25}])
    settings = (
        "keep_first_blocks",
        "keep_last_blocks",
        "dense_first_layers",
        "dense_last_layers",
        "dense_below_tokens",
    )
    done = render(rows, "precision=fast", *(f"precision.{name}=0" for name in settings))
    assert done.returncode == 0, done.stderr
    check_output(tmp_path / "out", ["fast"])
    assert results_of(runs_of(tmp_path / "out")[0])[0]["precision"] == "fast"
    refused = render(rows, "precision=fast", "precision.keep_first_blocks=0", "precision.keep_last_blocks=0")
    assert refused.returncode == 2 and "must leave one of the 2 layers of nano to block_sparse" in refused.stderr
