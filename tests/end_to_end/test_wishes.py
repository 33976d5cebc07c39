"""Rows that wish for adapters, a camera move, other numbers, a negative or an enhanced prompt, through jobs.render."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from tests.end_to_end.checker import results_of, runs_of
from tests.end_to_end.conftest import CLIP, Render, run_command

Manifest = Callable[[list[dict[str, Any]]], Path]


def test_wishes_are_honoured_and_change_the_clip_or_the_row_is_rejected(
    render: Render, manifest: Manifest, model_folder: Path, tmp_path: Path
) -> None:
    lora = [{"uri": str(model_folder / "nano-distilled-lora.safetensors"), "strength": 0.5}]
    wishes: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora": {"loras": lora},
        "camera": {"camera": "dolly-in"},
        "enhanced": {"enhance_prompt": True},
        "guided": {"recipe": "one_stage"},
        "steered": {
            "recipe": "one_stage",
            "negative_prompt": "grey",
            "cfg_scale": 2.0,
            "stg_scale": 0.5,
            "num_steps": 2,
        },
        "refined": {"recipe": "full_two_stage"},
        "draft": {"recipe": "draft", "width": 128, "height": 128},
    }
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "steps": ({"num_steps": 4}, "num_steps is not supported by recipe distilled_two_stage, got 4"),
        "negative": ({"negative_prompt": "grey"}, "negative_prompt is not supported by recipe distilled_two_stage"),
        "family": ({"recipe": "ltxv_one_pass"}, "recipe must suit the job's model and settings, got 'ltxv_one"),
        "small": ({"recipe": "draft"}, "width must be at least 128 with recipe draft, got 64; use 128"),
        "move": ({"camera": "pan"}, "camera must be one of dolly-in, got 'pan'"),
        "whose": ({"loras": [{"uri": str(model_folder / "nano.safetensors"), "strength": 1.0}]},
                  "loras[0].uri must be an adapter that fits the model"),
    }  # fmt: skip
    rows = {**wishes, **{name: row for name, (row, _) in refused.items()}}
    named = [{"id": name, "prompt": "a boat", "seed": 7, **CLIP, **row} for name, row in rows.items()]
    done = render(manifest(named))
    assert done.returncode == 3, done.stderr
    found = {row["id"]: row for row in results_of(runs_of(tmp_path / "out")[0])}
    for name, (_, message) in refused.items():
        assert found[name]["status"] == "rejected" and message in found[name]["error_message"], found[name]
    rendered = [found[name] for name in wishes]
    assert {row["status"] for row in rendered} == {"rendered"}
    assert len({row["sha256"] for row in rendered}) == len(wishes)
    assert found["enhanced"]["prompt"] not in ("a boat", "") and found["lora"]["prompt"] == "a boat"

    again = render(manifest(named))
    assert again.returncode == 3
    skipped = {row["id"]: row for row in results_of(runs_of(tmp_path / "out")[-1])}
    assert {skipped[name]["status"] for name in wishes} == {"skipped"}
    assert skipped["enhanced"]["prompt"] == found["enhanced"]["prompt"]


def test_a_lora_that_only_the_worker_finds_broken_sets_its_row_aside(
    render: Render, manifest: Manifest, model_folder: Path, tmp_path: Path
) -> None:
    """Of a header that contradicts itself the plan sees names, shapes and the size of the file, which all fit."""
    content = (model_folder / "nano-distilled-lora.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = next(entry for name, entry in header.items() if name != "__metadata__")
    first["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][1] - 2]
    (tmp_path / "a.safetensors").write_bytes(
        content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]
    )
    rows = [{"id": "bad", "loras": [{"uri": str(tmp_path / "a.safetensors")}]}, {"id": "good"}]
    done = render(manifest([{"prompt": "a boat", **CLIP, **row} for row in rows]))
    assert done.returncode == 3, done.stderr
    found = {row["id"]: row for row in results_of(runs_of(tmp_path / "out")[0])}
    assert [found[id]["status"] for id in ("bad", "good")] == ["failed", "rendered"]
    assert (found["bad"]["error_class"], found["bad"]["attempts"]) == ("InvalidRequest", 1)
    assert "loras and camera must be adapters that fit the model: " in found["bad"]["error_message"]
    assert "must be a complete safetensors file" in found["bad"]["error_message"]


def test_rows_for_adapters_that_were_never_staged_are_told_the_command(
    manifest: Manifest, model_folder: Path, tmp_path: Path, bucket: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder)
    sidecar = json.loads((folder / "fingerprint.nano.json").read_text())
    for name in ("nano-distilled-lora.safetensors", "nano-lora-camera-control-dolly-in.safetensors"):
        (folder / name).unlink()
        del sidecar["files"][name]
    (folder / "fingerprint.nano.json").write_text(json.dumps(sidecar))
    fsspec.filesystem("s3").put(f"{folder}/", f"{bucket}/m/", recursive=True)
    rows = [{"camera": "dolly-in"}, {"recipe": "full_two_stage"}]
    path = manifest([{"id": f"row-{i}", "prompt": "a boat", **CLIP, **row} for i, row in enumerate(rows)])
    for where in (str(folder), f"{bucket}/m"):
        done = run_command("estimate", f"manifest={path}", f"output={tmp_path / 'out'}", f"model.folder={where}")
        assert done.returncode == 3, done.stderr
        for name in ("dolly-in", "distilled"):
            way_out = f"run: python -m jobs.stage_weights model=nano extras=[{name}] model.folder={where}"
            assert f"{name} is not staged; {way_out}" in done.stdout, done.stdout


def test_an_estimate_without_the_model_tells_rows_with_other_adapters_apart(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    rows = [{}, {"camera": "dolly-in"}, *({"loras": [{"uri": f"{folder}{name}"}]} for name in ("/a", "/b", "-else/a"))]
    path = manifest([{"id": f"row-{i}", "prompt": "a boat", "seed": 1, **CLIP, **row} for i, row in enumerate(rows)])
    done = run_command("estimate", f"manifest={path}", f"output={tmp_path / 'out'}", f"model.folder={folder}")
    assert done.returncode == 3, done.stderr
    assert "to render 4 (and 0 rows that share" in done.stdout, done.stdout
    assert f"got '{folder}-else/a': {folder}-else/a must be readable" in done.stdout, "not of the model's folder"


def test_a_job_whose_recipe_the_model_cannot_follow_is_refused_before_anything_is_built(
    render: Render, manifest: Manifest, tmp_path: Path
) -> None:
    done = render(manifest([{"id": "a", "prompt": "a boat", **CLIP}]), "recipe=ltxv_one_pass")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe must suit model nano, got ltxv_one_pass: it is for models of family")
    assert not (tmp_path / "out").exists()
