"""The README's performance table is what the committed rows say, and what it makes of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.rows import append, new_row, read
from pipeline.bench.shapes import clips_named
from pipeline.bench.table import performance_table
from pipeline.errors import UsageError
from pipeline.geometry import PixelShape

ROOT = Path(__file__).resolve().parents[2]
H200 = {"gpus": ["NVIDIA H200, 143771 MiB, 580.159.04"], "cpu": "x86_64", "num_cpus": 32, "memory_bytes": 10**11}


def step_row(at: str, contestants: dict[str, dict[str, Any]], **facts: Any) -> dict[str, Any]:
    return {"at": at, "what": "step", "model": "ltx2_19b_distilled", "shape": "768x512x121", "hardware": H200,
            "versions": {"torch": "2.11.0"}, "contestants": contestants, **facts}  # fmt: skip


def timed(median_s: float, **facts: Any) -> dict[str, Any]:
    return {"median_s": median_s, "min_s": median_s / 2, "max_s": median_s * 2, **facts}


def lines_of(folder: Path, text: str) -> list[str]:
    return [line for line in performance_table(folder).splitlines() if text in line]


def test_the_table_of_the_readme_is_made_of_the_committed_rows() -> None:
    _, _, rest = (ROOT / "README.md").read_text().partition("<!-- made by: python -m jobs.bench table -->\n")
    block, end, _ = rest.partition("<!-- end -->\n")
    assert end, "the README has no such block"
    assert block == performance_table(ROOT / "tests" / "bench" / "results"), "put in what the command prints"


def test_of_each_shape_and_contestant_the_newest_row_counts(tmp_path: Path) -> None:
    append(tmp_path, step_row("2026-11-20T10:00:00+00:00", {"exact": timed(0.5), "fp8": timed(0.4)}))
    append(tmp_path, step_row("2026-11-21T11:00:00+00:00", {"exact": timed(0.3, tflops=612.3)}))
    (exact,) = lines_of(tmp_path, "`exact`")
    assert "0.300 (0.150 to 0.600) | 612 |" in exact and exact.endswith("2026-11-21 11:00, H200, torch 2.11.0 |")
    (fp8,) = lines_of(tmp_path, "`fp8`")
    assert "0.400" in fp8 and "2026-11-20 10:00" in fp8


def test_a_new_row_takes_the_place_of_one_of_the_older_scripts(tmp_path: Path) -> None:
    older = {"at": "2026-11-20T09:00:00+00:00", "hardware": "NVIDIA H200", "torch": "2.11.0+cu130"}
    found = {"median_s": 0.35, "all_s": [0.34, 0.36], "video against exact plain": {"relative": 0.011, "cosine": 1.0}}
    steps = {"768x512x121 exact beside": found, "768x512x121 exact fused": found}
    append(tmp_path, {**older, "what": "kernels", "steps": steps})
    (line,) = lines_of(tmp_path, "768x512x121")
    assert "0.350 (0.340 to 0.360)" in line and "| 0.011 |" in line
    append(tmp_path, step_row("2026-11-21T10:00:00+00:00", {"exact": timed(0.3)}))
    (line,) = lines_of(tmp_path, "768x512x121")
    assert "0.300" in line


@pytest.mark.parametrize("why", ["failure", "not_comparable", "error"])
def test_seconds_that_mean_nothing_are_not_shown(tmp_path: Path, why: str) -> None:
    append(tmp_path, step_row("2026-11-20T10:00:00+00:00", {"fp8": timed(0.001, tflops=9e9) | {why: "..."}}))
    (line,) = lines_of(tmp_path, "`fp8`")
    assert why.replace("_", " ") in line and "0.001" not in line and "9000000000" not in line


def test_ablations_are_left_out(tmp_path: Path) -> None:
    append(tmp_path, step_row("2026-11-20T10:00:00+00:00", {"exact_without_norms": timed(0.5), "exact": timed(0.4)}))
    assert len(lines_of(tmp_path, "exact")) == 1


def test_toys_and_processors_are_left_out(tmp_path: Path) -> None:
    append(tmp_path, step_row("2026-11-20T10:00:00+00:00", {"exact": timed(1.0)}, model="nano"))
    append(tmp_path, step_row("2026-11-20T10:00:00+00:00", {"exact": timed(1.0)}, hardware=H200 | {"gpus": []}))
    assert lines_of(tmp_path, "`exact`") == []


def test_a_sparse_tier_shows_effective_and_executed_rates_apart(tmp_path: Path) -> None:
    fast = timed(1.2, tflops=1428.4, executed_tflops=980.2, percent_of_fp8_gemm=65.3)
    dense = timed(1.2, tflops=1428.4, executed_tflops=1428.4)
    append(tmp_path, step_row("2026-11-20T10:00:00+00:00", {"fast": fast, "exact": dense}))
    (line,) = lines_of(tmp_path, "`fast`")
    assert "| 1428 effective, 980 executed |  | 65 |" in line
    (line,) = lines_of(tmp_path, "`exact`")
    assert "| 1428 |" in line


def batch_row(at: str, arguments: list[str], **facts: Any) -> dict[str, Any]:
    found = {"num_rendered": 32, "wall_s": 64.0, "clips_a_minute": 30.0, "video_s_per_s": 2.52, "num_gpus": 4,
             "gpu_seconds_a_clip_loaded": 8.25, "cost_usd_a_clip_loaded": 0.00825, "idle_share": 0.031,
             "layouts": {"single": 28, "ulysses4": 4}}  # fmt: skip
    return {"at": at, "what": "batch", "model": "ltx2_19b_distilled", "recipe": "distilled_two_stage",
            "precision": "fp8", "width": 1920, "height": 1088, "num_frames": 121, "num_clips": 32,
            "arguments": arguments, "gpu_memory_limit_gb": None, "hardware": H200, "versions": {"torch": "2.11.0"},
            **found, **facts}  # fmt: skip


def test_batches_are_shown_by_their_settings_and_half_rendered_ones_are_not(tmp_path: Path) -> None:
    auto, single = ["precision=fp8", "parallel=auto"], ["precision=fp8", "parallel=single"]
    append(tmp_path, batch_row("2026-11-20T10:00:00+00:00", auto, wall_s=99.0))
    append(tmp_path, batch_row("2026-11-20T11:00:00+00:00", single, layouts={"single": 32}))
    append(tmp_path, batch_row("2026-11-20T12:00:00+00:00", auto))
    append(tmp_path, batch_row("2026-11-20T13:00:00+00:00", auto, num_rendered=31, wall_s=1.0))
    append(tmp_path, batch_row("2026-11-20T14:00:00+00:00", auto, model="nano"))
    lines = lines_of(tmp_path, "| 32 |")
    assert len(lines) == 2
    (line,) = lines_of(tmp_path, "ulysses4")
    assert "| fp8 | 4 | 28 single, 4 ulysses4 | 64.0 s | 30.00 | 2.52 | 8.2 | 0.0083 | 3 % | 2026-11-20 12:00" in line


def latency_row(at: str, contestants: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"at": at, "what": "latency", "model": "ltx2_19b_distilled", "recipe": "distilled_two_stage",
            "shape": "1920x1088x121", "gpu_memory_limit_gb": None, "hardware": H200, "versions": {"torch": "2.11.0"},
            "contestants": contestants, **facts}  # fmt: skip


def clips(median_s: float) -> dict[str, Any]:
    stages = {"text_encode_s": 0.001, "denoise_s": 7.25, "upsample_s": 0.125, "decode_s": 1.5, "encode_s": 4.75}
    return timed(median_s, **stages, real_time_factor=5 / median_s, peak_gpu_memory_bytes=45.64e9)


def test_warm_clips_are_shown_by_tier_and_pictures(tmp_path: Path) -> None:
    both = {"natural": clips(10.0), "as_decoded": clips(20.0)}
    append(tmp_path, latency_row("2026-11-20T10:00:00+00:00", {"exact": {"pictures": both}, "fp8": {"pictures": both}}))
    fp8 = {"pictures": {"natural": clips(8.0), "as_decoded": clips(16.0)}}
    append(tmp_path, latency_row("2026-11-20T11:00:00+00:00", {"fp8": fp8}))
    append(tmp_path, latency_row("2026-11-20T12:00:00+00:00", {"fp8": fp8}, gpu_memory_limit_gb=80.0))
    append(tmp_path, latency_row("2026-11-20T13:00:00+00:00", {"fp8": fp8}, model="nano"))
    both["natural"]["closed_s"] = 9.5
    append(tmp_path, latency_row("2026-11-20T14:00:00+00:00", {"exact": {"pictures": both}}))
    lines = lines_of(tmp_path, "| ltx2_19b_distilled 1920x1088x121 |")
    assert len(lines) == 6
    assert len([line for line in lines if "| fp8 |" in line and "| 80 GB |" in line]) == 2
    (line,) = [line for line in lines if "| fp8 | natural |" in line and "11:00" in line]
    assert "| 8.000 (4.000 to 16.000) |  | 0.00 s | 7.25 s | 0.12 s | 1.50 s |  | 4.75 s | 0.62 | 45.6 GB |  |" in line
    assert [line for line in lines if "| exact | as decoded | 20.000" in line]
    assert [line for line in lines if "| exact | natural | 10.000 (5.000 to 20.000) | 9.50 s | 0.00 s |" in line]
    (line,) = [line for line in lines if "| exact | natural |" in line and "14:00" in line]
    assert "| 1.50 s | 0.62 s | 4.75 s |" in line, "9.5 less what the device took"


def test_a_tier_that_failed_or_is_not_itself_shows_no_seconds(tmp_path: Path) -> None:
    both = {"natural": clips(10.0), "as_decoded": clips(20.0)}
    contestants = {"exact": {"pictures": both, "error": "..."}, "fast": {"failure": "ImportError: no library"}}
    append(tmp_path, latency_row("2026-11-20T10:00:00+00:00", contestants))
    (head,), lines = lines_of(tmp_path, "| precision | pictures |"), lines_of(tmp_path, "1920x1088x121")
    assert ["error" in line for line in lines] == [True, True, False, False]
    assert ["failure" in line for line in lines] == [False, False, True, True]
    assert {line.count("|") for line in (head, *lines)} == {17}


def test_the_encoder_is_shown_for_hosts_of_gpus(tmp_path: Path) -> None:
    row = {"at": "2026-11-20T10:00:00+00:00", "what": "encode", "shape": "1920x1088x121", "hardware": H200,
           "settings": {"preset": "veryfast", "crf": 18, "x264_threads": 2}, "versions": {"torch": "2.11.0"},
           "contestants": {"natural": timed(3.0, size_bytes=41_250_000)}}  # fmt: skip
    append(tmp_path, row)
    append(tmp_path, {**row, "hardware": H200 | {"gpus": []}, "contestants": {"noise": timed(9.0, size_bytes=1)}})
    (line,) = lines_of(tmp_path, "veryfast")
    assert "| 1920x1088x121 | veryfast, CRF 18, 2 threads | natural | 3.000 (1.500 to 6.000) | 41.2 MB |" in line


def gang_row(at: str, contestants: dict[str, dict[str, Any]], **facts: Any) -> dict[str, Any]:
    return step_row(at, contestants, **{"what": "gang", "layout": "ulysses2", "num_gpus": 2, **facts})


def test_steps_on_several_gpus_are_shown_by_layout_beside_one_gpu(tmp_path: Path) -> None:
    cosines = {"video": {"cosine": 0.99998, "relative": 0.01}, "audio": {"cosine": 0.99991, "relative": 0.01}}
    exact = timed(1.4, speed_up=1.957, against_alone=cosines, weights_bytes=37.75e9)
    append(tmp_path, gang_row("2026-11-20T10:00:00+00:00", {"exact": timed(9.0), "xdit": timed(1.9)}))
    append(tmp_path, gang_row("2026-11-20T11:00:00+00:00", {"exact": exact}))
    append(tmp_path, gang_row("2026-11-20T12:00:00+00:00", {"exact": exact}, layout="tensor2"))
    append(tmp_path, gang_row("2026-11-20T13:00:00+00:00", {"exact": timed(0.1)}, model="nano"))
    ulysses, tensor = lines_of(tmp_path, "`exact`")
    assert ulysses == (
        "| ltx2_19b_distilled 768x512x121 | ulysses2 | `exact` | 1.400 (0.700 to 2.800) | 1.96 | 0.99991 | 37.8 GB | "
        "2026-11-20 11:00, H200, torch 2.11.0 |"
    )
    assert "| tensor2 |" in tensor
    (peer,) = lines_of(tmp_path, "`xdit`")
    assert "1.900 (0.950 to 3.800) |  |  |  | 2026-11-20 10:00" in peer, "nobody has measured it on one GPU"


def test_a_contestant_that_failed_on_several_gpus_shows_no_numbers(tmp_path: Path) -> None:
    off = {"not_comparable": "...", "against_alone": {"video": {"cosine": 0.5}}}
    wrong = timed(1.4, speed_up=1.9, error="...")
    append(tmp_path, gang_row("2026-11-20T10:00:00+00:00", {"fast": {"failure": "no"}, "fp8": off, "exact": wrong}))
    assert "| error |  |  |  |" in lines_of(tmp_path, "`exact`")[0]
    assert "| failure |  |  |  |" in lines_of(tmp_path, "`fast`")[0]
    assert "| not comparable |  | 0.50000 |  |" in lines_of(tmp_path, "`fp8`")[0]


def test_some_tables_are_not_there_before_they_are_measured(tmp_path: Path) -> None:
    table = performance_table(tmp_path)
    for head in ("| batch |", "| encoding |", "| warm clip |", "| one step on several GPUs |"):
        assert head not in table


def test_a_row_says_when_and_on_what_it_was_measured(tmp_path: Path) -> None:
    append(tmp_path, new_row("kernel", shape="64x64x9"))
    (row,) = read(tmp_path, "kernel")
    assert row["what"] == "kernel" and row["at"].endswith("+00:00") and row["shape"] == "64x64x9"
    assert row["hardware"]["num_cpus"] >= 1 and row["versions"]["torch"] and row["versions"]["python"]
    assert read(tmp_path, "step") == []


def test_shapes_are_named_by_width_height_and_frames() -> None:
    assert clips_named(["768x512x121"], 24.0) == {"768x512x121": PixelShape(121, 512, 768, 24.0)}


@pytest.mark.parametrize("name", ["768x512", "768x512x120", "760x512x121", "0x512x121", "768x512x121x2", "big"])
def test_a_shape_off_the_grid_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="multiples of 32 pixels and 8k\\+1 frames, got"):
        clips_named([name], 24.0)
