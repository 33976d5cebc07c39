"""Bad input: one line that names the thing, the rule, the value and the way out; the right exit code; nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.end_to_end.checker import check_output, results_of, runs_of
from tests.end_to_end.conftest import Render, run_command, small_rows
from tests.golden import GoldenFolders

Manifest = Callable[[list[dict[str, Any]]], Path]


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit 2 with one error and no traceback."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    # A list of differences follows its error, indented.
    start = done.stderr.index(errors[0])
    assert all(part in done.stderr[start:] for part in parts), done.stderr


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("manifst=x", ("'manifst' is not a setting", "did you mean manifest?")),
        ("recipe.encode.crff=20", ("did you mean recipe.encode.crf?",)),
        ("limit=many", ("limit: Value 'many'", "could not be converted to Integer")),
        ("model=ltx3", ("model must be one of", "nano", "got 'ltx3'")),
        ("recipe.encode.crf=99", ("recipe.encode.crf must be between 0 and 51, got 99",)),
        ("manifest=/data/date=2026-11-20/absent.parquet", ("manifest must exist", "date=2026-11-20")),
        ("deadline=soon", ("deadline must be an ISO 8601 time, got 'soon'",)),
        ("run_id=a/b", ("run_id must be letters",)),
        ("ids=[nobody]", ("ids must name rows of the manifest, got nobody",)),
        ("nonsense", ("arguments must be key=value, got 'nonsense'",)),
        ("manifest", ("arguments must be key=value, got 'manifest'",)),
        ("manifest=", ("manifest must not be empty",)),
        ("recipe=null", ("Config group override must be a string",)),
    ],
)
def test_wrong_settings_are_refused(render: Render, manifest: Manifest, argument: str, parts: tuple[str, ...]) -> None:
    assert_refused(render(manifest(small_rows(1)), argument), *parts)


def test_an_unreadable_manifest_is_refused(render: Render, tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not parquet at all")
    assert_refused(render(broken), "manifest must be Parquet", str(broken))


def test_a_used_run_id_is_refused(render: Render, manifest: Manifest) -> None:
    path = manifest(small_rows(1))
    assert render(path, "run_id=night-1").returncode == 0
    assert_refused(render(path, "run_id=night-1"), "run_id must be new, got 'night-1'")


def test_an_output_that_cannot_be_written_is_refused(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    assert_refused(render(manifest(small_rows(1))), "output must be writable", str(tmp_path / "out"))


def test_sizes_off_the_grid_are_rejected_without_crop(render: Render, manifest: Manifest, tmp_path: Path) -> None:
    rows = small_rows(1)
    rows[0]["width"] = 100
    assert render(manifest(rows), "recipe.crop=false").returncode == 3
    (row,) = results_of(runs_of(tmp_path / "out")[0])
    assert "width must be a multiple of 64 with recipe.crop=false, got 100; use 64 or 128" in row["error_message"]


def test_a_model_that_is_not_staged_says_how_to_stage_it(tmp_path: Path, manifest: Manifest) -> None:
    done = run_command("render", f"manifest={manifest(small_rows(1))}", f"output={tmp_path / 'out'}",
                       "model=ltx2_19b_distilled")  # fmt: skip
    assert_refused(done, "must be staged", "python -m jobs.stage_weights model=ltx2_19b_distilled")


@pytest.fixture
def broken_model(model_folder: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """A staged copy of the nano model whose checkpoint's tensors went through `change`."""

    def build(change: Callable[[dict[str, Any]], None]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        path = folder / "nano.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        change(tensors)
        save_file(tensors, path, metadata)
        assert run_command("stage_weights", f"model.folder={folder}").returncode == 0
        return folder

    return build


TENSOR = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda tensors: tensors.pop(TENSOR), (TENSOR, "missing")),
        (lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:-1].clone()}), (TENSOR, "shape")),
        (
            lambda tensors: tensors.update({"model.diffusion_model.new.weight": tensors[TENSOR].clone()}),
            ("new.weight",),
        ),
        (lambda tensors: tensors.pop("vae.decoder.conv_in.conv.weight"), ("vae.decoder.conv_in.conv.weight",)),
        (lambda tensors: tensors.pop("vocoder.conv_pre.bias"), ("vocoder.conv_pre.bias",)),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_row(
    broken_model: Callable[..., Path], manifest: Manifest, tmp_path: Path, change: Any, parts: tuple[str, ...]
) -> None:
    folder = broken_model(change)
    done = run_command("render", f"manifest={manifest(small_rows(2))}", f"output={tmp_path / 'out'}",
                       f"model.folder={folder}")  # fmt: skip
    assert_refused(done, "nano.safetensors", *parts)
    assert {row["status"] for row in results_of(runs_of(tmp_path / "out")[0])} == {"not_started"}


def of_another_model(path: Path, fixtures: GoldenFolders) -> None:
    shutil.copy(fixtures / "dit_ltxv_0_9_8_2b" / "model.safetensors", path)


def cut_short(path: Path, fixtures: GoldenFolders) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def without_metadata(path: Path, fixtures: GoldenFolders) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, path)


def as_it_is(path: Path, fixtures: GoldenFolders) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "setting", "parts"),
    [
        (of_another_model, "", ("nano.safetensors",)),
        (as_it_is, "model.size.num_layers=3", ("num_layers must be 2, got 3", "nano.safetensors", "correct conf/")),
        (cut_short, "", ("nano.safetensors", "must be a complete safetensors file", "fetch the file again")),
        (without_metadata, "", ("nano.safetensors", "metadata", "use a published single-file checkpoint")),
    ],
)
def test_a_file_that_is_no_checkpoint_of_this_model_is_refused(
    model_folder: Path, fixtures: GoldenFolders, manifest: Manifest, tmp_path: Path, spoil: Any, setting: str,
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    spoil(folder / "nano.safetensors", fixtures)
    assert run_command("stage_weights", f"model.folder={folder}").returncode == 0
    arguments = [f"manifest={manifest(small_rows(1))}", f"output={tmp_path / 'out'}", f"model.folder={folder}"]
    assert_refused(run_command("render", *arguments, *([setting] if setting else [])), *parts)


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (torch.int32, "must hold floating numbers, got int32"),
        (torch.float8_e4m3fn, "must come with weight_scale because it is float8_e4m3fn, got none"),
        (torch.bfloat16, "must be float32 like the denoiser's other matrices, got bfloat16"),
    ],
)
def test_a_tensor_of_the_wrong_numbers_is_refused(
    broken_model: Callable[..., Path], manifest: Manifest, tmp_path: Path, dtype: torch.dtype, rule: str
) -> None:
    folder = broken_model(lambda tensors: tensors.update({TENSOR: tensors[TENSOR].to(dtype)}))
    done = run_command("render", f"manifest={manifest(small_rows(1))}", f"output={tmp_path / 'out'}",
                       f"model.folder={folder}")  # fmt: skip
    assert_refused(done, "nano.safetensors", TENSOR, rule, "use the published file")


def test_model_files_that_changed_after_staging_are_noticed(
    model_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "nano.safetensors").write_bytes(b"short")
    done = run_command("estimate", f"manifest={manifest(small_rows(1))}", f"model.folder={folder}")
    assert_refused(done, "must be those that were staged", "nano.safetensors", "python -m jobs.stage_weights")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root; the unit tests cover the error itself")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_the_job_and_a_rerun_with_space_goes_on(
    small_disk: Path, model_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    output = small_disk / "out"
    path = manifest(small_rows(5))
    arguments = (f"manifest={path}", f"output={output}", f"model.folder={model_folder}")
    assert run_command("render", *arguments, "limit=1").returncode == 0
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 4096)
    while (free := os.statvfs(small_disk)).f_bavail * free.f_bsize > 48 * 1024:
        with filler.open("ab") as stream:
            stream.write(b"x" * 8192)
    done = run_command("render", *arguments)
    assert done.returncode == 6, (done.stdout, done.stderr)
    assert "disk full" in done.stderr and "free space" in done.stderr and "Traceback" not in done.stderr
    filler.unlink()
    assert run_command("render", *arguments).returncode == 0
    check_output(output, [f"clip-{i}" for i in range(5)])
