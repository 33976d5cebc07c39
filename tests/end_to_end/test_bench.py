"""jobs.bench on CPU: one clip of the nano model through Ray, and what it adds to the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import jobs.bench
from pipeline.config.jobs import BenchJob
from pipeline.config.model import DenoiserSize, ModelConfig
from pipeline.engine.components.text_encoder import load_text_encoder
from pipeline.engine.nano import CHECKPOINT, SPATIAL_UPSCALER, TEXT_ENCODER
from tests.end_to_end.conftest import run_command
from tests.end_to_end.test_bad_input import assert_refused


@pytest.mark.ray
def test_a_clip_adds_a_dated_row_with_hardware_and_versions(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["width=64", "height=64", "num_frames=9", "recipe.encode.crf=30", f"folder={model_folder}"]
    arguments += [f"output={tmp_path / 'out'}", f"results={tmp_path / 'results'}"]
    done = run_command("bench", "clip", *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "results" / "clip.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["status"] == "rendered" and row["playable"] is True
    assert row["model"] == "nano" and row["arguments"] == ["recipe.encode.crf=30"]
    assert (row["width"], row["height"], row["num_frames"]) == (64, 64, 9)
    assert row["load_s"] > 0 and row["load_gb_per_s"] > 0 and row["wall_s"] >= row["denoise_s"] > 0
    assert row["first_clip_s"] > row["wall_s"] + row["load_s"]
    files = json.loads((model_folder / "fingerprint.nano.json").read_text())["files"]
    extras = {name for name in files if "lora" in name}
    loaded = sum(facts["size_bytes"] for name, facts in files.items() if name not in extras)
    assert len(extras) == 2 and row["load_gb"] == loaded / 1e9, "adapters are staged and not loaded"
    assert row["peak_gpu_memory_bytes"] is None
    assert 100e6 < row["peak_host_memory_bytes"] < 100e9
    assert row["versions"]["torch"] and row["hardware"]["num_cpus"] >= 1
    assert row["at"].startswith("20")


def test_a_clip_that_is_not_rendered_is_a_row_too(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["width=64", "height=64", "num_frames=9", "limits.max_side_px=32", f"folder={model_folder}"]
    done = run_command("bench", "clip", *arguments, f"output={tmp_path / 'out'}", f"results={tmp_path}")
    assert done.returncode == 3, done.stderr
    row = json.loads((tmp_path / "clip.jsonl").read_text())
    assert row["status"] == "rejected" and row["exit_code"] == 3 and row["first_clip_s"] is None


@pytest.mark.ray
def test_a_batch_adds_a_row_of_how_fast_its_clips_came(model_folder: Path, tmp_path: Path) -> None:
    done = run_command("bench", "batch", "num_clips=5", "width=64", "height=64", "num_frames=9",
                       f"folder={model_folder}", f"output={tmp_path / 'out'}", f"results={tmp_path / 'results'}",
                       "cluster.num_workers=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "results" / "batch.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["num_rendered"] == row["num_clips"] == 5 and row["error_message"] is None
    assert row["model"] == "nano" and row["arguments"] == ["cluster.num_workers=2"] and row["num_gpus"] == 2
    assert row["clips_a_minute"] == pytest.approx(60 * 5 / row["wall_s"])
    assert row["video_s_per_s"] == pytest.approx(5 * 9 / 24 / row["wall_s"])
    assert row["layouts"] == {"single": 5}
    assert 0 <= row["idle_share"] < 1 and sum(row["share_by_state"].values()) == pytest.approx(1)
    assert 0 < row["gpu_seconds_a_clip"] < row["gpu_seconds_a_clip_loaded"], "loading is paid for too"
    assert 0 < row["cost_usd_a_clip"] < row["cost_usd_a_clip_loaded"]


def test_the_encoder_is_timed_with_the_settings_of_a_recipe(tmp_path: Path) -> None:
    size = ["width=128", "height=64", "num_frames=9"]
    done = run_command("bench", "encode", *size, f"results={tmp_path}", "recipe.encode.crf=30")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "encode.jsonl").read_text())
    assert row["shape"] == "128x64x9" and row["settings"]["crf"] == 30 and row["settings"]["preset"] == "veryfast"
    natural, noise = row["contestants"]["natural"], row["contestants"]["noise"]
    assert natural["median_s"] > 0 and len(noise["all_s"]) == 3
    assert 0 < natural["size_bytes"] < noise["size_bytes"] / 3
    assert_refused(run_command("bench", "encode", "recipe.encode.preset=fastest"), "recipe.encode.preset", "'fastest'")


def test_a_step_on_two_ranks_adds_a_row_for_each_layout(tmp_path: Path) -> None:
    arguments = ["shapes=[64x64x9]", "contestants=[exact,xdit]", f"results={tmp_path}"]
    done = run_command("bench", "gang", "layouts=[ring2]", *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "gang.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["model"], row["shape"], row["layout"], row["num_gpus"]) == ("nano", "64x64x9", "ring2", 2)
    assert row["contestants"]["exact"]["speed_up"] > 0 and "xDiT must" in row["contestants"]["xdit"]["failure"]
    assert '64x64x9 layout: "ring2"' in done.stdout
    assert_refused(run_command("bench", "gang", "contestants=[exat]"), "contestants must be of", "exat")


def test_a_bound_on_gpu_memory_is_refused_without_a_gpu(model_folder: Path, tmp_path: Path) -> None:
    done = run_command("render", f"model.folder={model_folder}", f"output={tmp_path / 'out'}", "cluster.device=cpu",
                       "cluster.gpu_memory_limit_gb=80")  # fmt: skip
    assert_refused(done, "cluster.gpu_memory_limit_gb must be left out on cpu, got 80")


def test_a_bench_that_does_not_exist_is_refused() -> None:
    assert_refused(
        run_command("bench", "cip"),
        "write, clip, batch, latency, step, profile, gang, decode, kernel, encode or table",
        "'cip'",
    )
    assert_refused(run_command("bench", "write", "model=ltx2_19b_dev"), "folder=")
    assert_refused(run_command("bench", "clip", "widht=64"), "'widht' is not a setting")
    assert_refused(run_command("bench", "step", "recipe.encode.crf=30"), "settings of its own alone")
    assert_refused(run_command("bench", "decode", "shapes=[64x64x8]"), "8k+1 frames", "'64x64x8'")


def lacks_flash_attention(row: dict[str, Any], name: str) -> bool:
    """If that kept a contestant out: on a GPU the library may be missing, and takes no heads as narrow as a toy's."""
    failure = row["contestants"][name].get("failure", "")
    if not failure:
        return False
    assert row["device"] == "cuda" and name in ("fast", "block_sparse_attention_0.3"), failure
    assert "flash_attn" in failure or "head" in failure
    return True


def test_whole_clips_are_timed_in_one_process_without_files(tmp_path: Path) -> None:
    done = run_command("bench", "latency", "shapes=[64x64x9]", "repeats=2", f"results={tmp_path}",
                       "recipe=distilled_two_stage_short", "recipe.encode.crf=30")  # fmt: skip
    row = json.loads((tmp_path / "latency.jsonl").read_text())
    assert row["what"] == "latency" and row["shape"] == "64x64x9" and row["at"].startswith("20")
    assert row["model"] == "nano" and row["recipe"] == "distilled_two_stage_short" and row["duration_s"] == 9 / 24
    assert row["repeats"] == {"natural": 2, "as_decoded": 1} and row["alone"] is False
    assert row["versions"]["torch"] and row["hardware"]["num_cpus"] >= 1 and row["ceilings"]["copy_tb_per_s"] > 0
    assert list(row["contestants"]) == ["exact", "fp8", "fast"]
    timed = {name: facts for name, facts in row["contestants"].items() if not lacks_flash_attention(row, name)}
    for facts in timed.values():
        assert list(facts["difference"]) == ["video", "audio"]
        for pictures, found in facts["pictures"].items():
            assert len(found["clips"]) == len(found["all_s"]) == row["repeats"][pictures]
            assert 0 < found["min_s"] <= found["median_s"] <= found["max_s"]
            assert found["real_time_factor"] == pytest.approx(row["duration_s"] / found["median_s"])
    assert done.returncode == (1 if any("error" in facts for facts in timed.values()) else 0), done.stderr


def test_clips_that_cannot_be_timed_are_refused() -> None:
    assert_refused(run_command("bench", "latency", "contestants=[exact,fastest]"), "exact, fp8, fast", "got fastest")
    assert_refused(run_command("bench", "latency", "precision=fp8"), "settings of its own alone")
    assert_refused(run_command("bench", "latency", "repeats=0"), "repeats must be 1 or more")


@pytest.mark.parametrize(
    ("what", "shapes", "contestants"),
    [
        ("step", ["64x64x9", "96x64x9"], ["plain", "exact", "fp8", "fast", "diffusers"]),
        ("decode", ["64x64x9"], ["whole", "whole_channels_last", "tiled", "stream_1", "stream_8_channels_last_fused"]),
        ("kernel", ["64x64x9"], ["rms_norm", "linear_gelu", "self_attention", "block_sparse_attention_0.3"]),
    ],
)
def test_a_measurement_adds_a_dated_row_for_each_shape(
    what: str, shapes: list[str], contestants: list[str], tmp_path: Path
) -> None:
    # Compiling diffusers for a CPU takes half a minute and shows nothing of a GPU.
    chosen = [f"contestants=[{','.join(contestants)}]"] if what in ("step", "decode") else []
    done = run_command("bench", what, f"shapes=[{','.join(shapes)}]", f"results={tmp_path}", *chosen)
    rows = [json.loads(line) for line in (tmp_path / f"{what}.jsonl").read_text().splitlines()]
    assert [row["shape"] for row in rows] == shapes
    for row in rows:
        assert row["what"] == what and row["model"] == "nano" and row["device"] in ("cpu", "cuda")
        assert row["versions"]["diffusers"] and row["hardware"]["num_cpus"] >= 1
        assert row["ceilings"]["copy_tb_per_s"] > 0 and row["at"].startswith("20")
        assert set(contestants) <= row["contestants"].keys()
        for name in contestants:
            facts = row["contestants"][name]
            if lacks_flash_attention(row, name):
                continue
            times = facts["fused"] if what == "kernel" else facts
            assert times["median_s"] > 0 and len(times["all_s"]) >= 5
    # A busy machine may have stood still while ceilings were measured; then times below them are rightly errors.
    errors = [facts for row in rows for facts in row["contestants"].values() if "error" in facts]
    assert done.returncode == (1 if errors else 0), done.stderr


@pytest.mark.gpu
def test_a_profile_says_what_each_step_is_made_of(tmp_path: Path) -> None:
    done = run_command("bench", "profile", "shapes=[64x64x9]", "contestants=[plain,exact]", f"results={tmp_path}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "profile.jsonl").read_text())
    assert row["what"] == "profile" and row["shape"] == "64x64x9" and row["versions"]["torch"]
    for facts in row["contestants"].values():
        times = [ms for _, _, ms in facts["kernels"]]
        assert times == sorted(times, reverse=True) and 0 < sum(times) <= facts["sum_ms"]
    if row["device"] == "cpu":
        # Two products of 2 layers' feed-forward, at least.
        assert any("addmm" in name and calls >= 4 for name, calls, _ in row["contestants"]["plain"]["kernels"])


def test_the_table_is_printed(tmp_path: Path) -> None:
    done = run_command("bench", "table", f"results={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| --- |") == 3


def description(path: Path) -> dict:
    """A file's layout and metadata in the form of conf/published."""
    tensors: dict[str, list[str]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensors.setdefault("x".join(map(str, file.get_slice(name).get_shape())), []).append(name)
        return {"config": json.loads(file.metadata().get("config", "{}")), "tensors": tensors}


@pytest.mark.ray
def test_written_files_are_staged_and_render(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf, encoder = tmp_path / "conf" / "published", description(model_folder / TEXT_ENCODER / "model.safetensors")
    conf.mkdir(parents=True)
    encoder["config"] = json.loads((model_folder / TEXT_ENCODER / "config.json").read_text())
    (conf / "encoder.json").write_text(json.dumps(encoder))
    parts = {"checkpoint": description(model_folder / CHECKPOINT), "text_encoder": "encoder",
             "spatial_upscaler": description(model_folder / SPATIAL_UPSCALER)}  # fmt: skip
    (conf / "tiny.json").write_text(json.dumps(parts))
    monkeypatch.setattr(jobs.bench, "CONF", tmp_path / "conf")
    model = ModelConfig("tiny_random", str(tmp_path / "m"), CHECKPOINT, TEXT_ENCODER, SPATIAL_UPSCALER,
                        size=DenoiserSize(2, 64, 32, 128, num_heads=4, num_audio_heads=4))  # fmt: skip
    job = BenchJob(model=model, folder=model.folder)
    assert jobs.bench.write(job, [], []) == 0
    sidecar = (tmp_path / "m" / "fingerprint.tiny_random.json").read_text()
    assert jobs.bench.write(job, [], []) == 0, "what is there stays"
    assert (tmp_path / "m" / "fingerprint.tiny_random.json").read_text() == sidecar

    same = [f"model.{name}={getattr(model, name)}" for name in ("name", "folder")]
    done = run_command("bench", "clip", *same, "width=64", "height=64", "num_frames=9", f"output={tmp_path / 'out'}",
                       f"results={tmp_path / 'results'}", "cluster=in_process")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results" / "clip.jsonl").read_text())["playable"]


@pytest.mark.parametrize("real", ["model-00001-of-00002.safetensors", "config.json", "text_encoder/config.json"])
def test_a_text_encoder_that_is_there_is_never_written_to(tmp_path: Path, real: str) -> None:
    (tmp_path / real).parent.mkdir(exist_ok=True)
    (tmp_path / real).write_bytes(b"a licensed file")
    jobs.bench._write_text_encoder(tmp_path, "gemma-3-12b")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / real]
    assert (tmp_path / real).read_bytes() == b"a licensed file"


def test_a_written_t5_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = "encoder.block.{0-1}.layer."
    tensors = {
        "512x16": ["shared.weight"], "8x2": ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        "16x16": [f"{block}0.SelfAttention.{name}.weight" for name in "qkvo"],
        "32x16": [f"{block}1.DenseReluDense.wi_{index}.weight" for index in (0, 1)],
        "16x32": [f"{block}1.DenseReluDense.wo.weight"],
        "16": [f"{block}0.layer_norm.weight", f"{block}1.layer_norm.weight", "encoder.final_layer_norm.weight"],
    }  # fmt: skip
    config = json.loads((jobs.bench.CONF / "published" / "t5-v1_1-xxl.json").read_text())["config"]
    config |= {"vocab_size": 512, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
               "relative_attention_num_buckets": 8}  # fmt: skip
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "t5.json").write_text(json.dumps({"config": config, "tensors": tensors}))
    monkeypatch.setattr(jobs.bench, "CONF", tmp_path)
    jobs.bench._write_text_encoder(tmp_path / "t5", "t5")
    encoder = load_text_encoder(tmp_path / "t5", max_tokens=32, device="cpu", dtype=None)
    states = encoder.encode(["a red fox"])
    assert states.hidden_BSDL.isfinite().all() and states.hidden_BSDL.std() > 0
