"""jobs.stage_weights against a hub of the test's own: fetched once, resumed, checked, and refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import UsageError
from pipeline.storage.hub import CHUNK_BYTES, fetch
from pipeline.storage.models import fingerprint, local_copy
from pipeline.storage.models import stage as stage_files
from tests.end_to_end.conftest import ROOT, command, run_command
from tests.end_to_end.hub_server import Hub, serve
from tests.end_to_end.test_bad_input import assert_refused

CHECKPOINT = "ltx-2-19b-distilled.safetensors"
UPSCALER = "ltx-2-spatial-upscaler-x2-1.0.safetensors"
GEMMA = "google/gemma-3-12b-it-qat-q4_0-unquantized"
STATIC = "ltx-2-19b-lora-camera-control-static.safetensors"
STATIC_REPOSITORY = "Lightricks/LTX-2-19b-LoRA-Camera-Control-Static"
OURS = "ltx2_19b_distilled"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub with the files of LTX-2 19B distilled, kilobytes instead of gigabytes, as this process's HF_ENDPOINT."""
    draw = random.Random(7)
    hub = Hub()
    hub.repositories = {
        "Lightricks/LTX-2": {CHECKPOINT: draw.randbytes(50_000), UPSCALER: draw.randbytes(3_000), "README.md": b"x"},
        GEMMA: {"config.json": b"{}", "model-00001-of-00002.safetensors": draw.randbytes(20_000),
                "model-00002-of-00002.safetensors": draw.randbytes(10_000), "tokenizer.json": draw.randbytes(500),
                "extra/notes.txt": b"nested", "README.md": b"x", ".gitattributes": b"x"},
        STATIC_REPOSITORY: {STATIC: draw.randbytes(2_000)},
    }  # fmt: skip
    server = serve(hub)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.go_on.set()
    server.shutdown()
    server.server_close()


def stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("stage_weights", f"model={OURS}", f"model.folder={folder}", *arguments)


def placed(folder: Path) -> set[str]:
    """Every file that is visible under the model's folder, but for lock and sidecar."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if not path.name.startswith(("fingerprint.", ".fetch.lock"))}


def sidecar(folder: Path) -> dict:
    return json.loads((folder / f"fingerprint.{OURS}.json").read_text())


def test_a_published_model_is_fetched_checked_and_fingerprinted(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    done = stage(folder)
    assert done.returncode == 0, done.stderr
    encoder = "gemma-3-12b-it-qat-q4_0-unquantized"
    ours = {f"{encoder}/{name}": content for name, content in hub.repositories[GEMMA].items()
            if name not in ("README.md", ".gitattributes")}  # fmt: skip
    ours |= {name: hub.repositories["Lightricks/LTX-2"][name] for name in (CHECKPOINT, UPSCALER)}
    assert placed(folder) == set(ours)
    assert all((folder / name).read_bytes() == content for name, content in ours.items())
    assert {name: facts["sha256"] for name, facts in sidecar(folder)["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in ours.items()
    }
    assert "LTX-2 Community License" in done.stderr
    assert f"{sum(map(len, ours.values())) / 1e3:.1f} kB of" in done.stderr.splitlines()[-1]

    before = len(hub.asked)
    again = stage(folder)
    assert again.stdout == done.stdout, "hashed from the disk, the fingerprint is the same"
    assert len(hub.asked) == before


def test_an_adapter_is_fetched_when_asked_for_and_changes_no_fingerprint(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert stage(folder).returncode == 0
    before = sidecar(folder)
    assert stage(folder, "extras=[static]").returncode == 0
    assert (folder / STATIC).read_bytes() == hub.repositories[STATIC_REPOSITORY][STATIC]
    assert sidecar(folder)["fingerprint"] == before["fingerprint"]
    assert sidecar(folder)["files"].keys() - before["files"].keys() == {STATIC}
    assert stage(folder).returncode == 0
    assert STATIC in sidecar(folder)["files"], "an adapter that is there stays in the books"
    assert_refused(stage(folder, "extras=[zoom]"), "extras must be names", "'zoom'", "dolly-in", "static")


def test_a_killed_fetch_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    folder, content = tmp_path / "model", random.Random(8).randbytes(CHUNK_BYTES + 1_000_000)
    hub.repositories["Lightricks/LTX-2"][CHECKPOINT] = content
    hub.stall_after_first = {CHECKPOINT}
    first = subprocess.Popen(command("stage_weights", f"model={OURS}", f"model.folder={folder}"), cwd=ROOT,
                             stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ)  # fmt: skip
    assert hub.stalled.wait(60)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert CHECKPOINT not in placed(folder), "nothing unfinished has its name"
    hub.stall_after_first.clear()
    hub.go_on.set()
    hub.asked.clear()
    done = stage(folder)
    assert done.returncode == 0, done.stderr
    assert hub.fetched(CHECKPOINT) == [(CHUNK_BYTES, len(content) - 1)]
    assert (folder / CHECKPOINT).read_bytes() == content


def test_a_transfer_that_breaks_off_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.break_once = {CHECKPOINT}
    done = stage(tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert len(hub.fetched(CHECKPOINT)) == 2


@pytest.mark.parametrize(
    ("path", "stated"),
    [(CHECKPOINT, {"sha256": "0" * 64}), ("tokenizer.json", {"git": "0" * 40})],
    ids=["large file", "small file"],
)
def test_bytes_of_another_hash_are_not_used(hub: Hub, tmp_path: Path, path: str, stated: dict) -> None:
    hub.stated = {path: stated}
    folder = tmp_path / "model"
    done = stage(folder)
    assert done.returncode == 6, done.stderr
    assert "must have the hash 0000" in done.stderr and path in done.stderr
    assert not any(name.endswith(path) for name in placed(folder))
    hub.stated = {}
    assert stage(folder).returncode == 0, "the copy was removed, so the next fetch begins it again"


def test_a_licence_that_is_not_accepted_is_one_line_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.closed = {GEMMA}
    done = stage(tmp_path / "model")
    assert_refused(done, GEMMA, f"accept its licence on https://huggingface.co/{GEMMA}", "HF_TOKEN")
    assert all(last == first for _, first, last in hub.asked)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert stage(tmp_path / "model").returncode == 0


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.stated = {CHECKPOINT: {"size": 10**15}}
    done = stage(tmp_path / "model")
    assert done.returncode == 6
    assert "must have 1000000.0 GB free" in done.stderr and "got" in done.stderr, done.stderr
    assert all(last == first for _, first, last in hub.asked)


def test_two_processes_on_a_node_fetch_each_file_once(hub: Hub, tmp_path: Path) -> None:
    arguments = command("stage_weights", f"model={OURS}", f"model.folder={tmp_path / 'model'}")
    both = [subprocess.Popen(arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=os.environ) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert len(hub.fetched(CHECKPOINT)) == 1


def test_the_list_shows_every_repository_with_sizes_and_parts(hub: Hub, tmp_path: Path) -> None:
    for name in ("Canny-Control", "Depth-Control", "Pose-Control", "Detailer"):
        hub.repositories[f"Lightricks/LTX-2-19b-IC-LoRA-{name}"] = {"a.safetensors": b"a"}
    for name in ("Dolly-In", "Dolly-Out", "Dolly-Left", "Dolly-Right", "Jib-Up", "Jib-Down"):
        hub.repositories[f"Lightricks/LTX-2-19b-LoRA-Camera-Control-{name}"] = {"a.safetensors": b"a"}
    done = stage(tmp_path / "model", "list=true")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["50.0", "kB", f"hf://Lightricks/LTX-2/{CHECKPOINT}", "checkpoint"] in lines
    assert ["20.0", "kB", f"hf://{GEMMA}/model-00001-of-00002.safetensors", "text_encoder"] in lines
    assert ["2.0", "kB", f"hf://{STATIC_REPOSITORY}/{STATIC}", "static"] in lines
    assert ["1", "B", "hf://Lightricks/LTX-2/README.md"] in lines
    assert not (tmp_path / "model").exists()


def test_a_repository_that_is_not_there_is_refused(hub: Hub, tmp_path: Path) -> None:
    done = stage(tmp_path / "model", "model.sources.checkpoint=hf://Lightricks/LTX-2/other.safetensors")
    assert_refused(done, "hf://Lightricks/LTX-2/other.safetensors must exist", "model.sources")


def test_parts_come_from_a_bucket_and_are_checked_by_its_sidecar(hub: Hub, bucket: str, tmp_path: Path) -> None:
    assert stage(tmp_path / "first").returncode == 0
    fs = fsspec.filesystem("s3")
    fs.put(f"{tmp_path / 'first'}/", f"{bucket}/ltx-2/", recursive=True)
    encoder = "gemma-3-12b-it-qat-q4_0-unquantized"
    sources = [f"model.sources.{part}={bucket}/ltx-2/{name}" for part, name in
               (("checkpoint", CHECKPOINT), ("text_encoder", encoder), ("spatial_upscaler", UPSCALER))]  # fmt: skip
    hub.asked.clear()
    done = stage(tmp_path / "second", *sources)
    assert done.returncode == 0, done.stderr
    assert sidecar(tmp_path / "second") == sidecar(tmp_path / "first")
    assert not hub.asked
    fs.pipe_file(f"{bucket}/ltx-2/{CHECKPOINT}", b"x" * 50_000)
    spoilt = stage(tmp_path / "third", *sources)
    assert spoilt.returncode == 6 and "must have the hash" in spoilt.stderr, spoilt.stderr


def test_a_published_model_goes_straight_into_a_bucket(hub: Hub, bucket: str, tmp_path: Path) -> None:
    done = run_command("stage_weights", f"model={OURS}", f"model.folder={bucket}/m", f"model.cache={tmp_path}")
    assert done.returncode == 0, done.stderr
    files = {path.removeprefix(f"{bucket.removeprefix('s3://')}/m/") for path in
             fsspec.filesystem("s3", use_listings_cache=False).find(f"{bucket}/m")}  # fmt: skip
    facts = json.loads(fsspec.filesystem("s3").cat(f"{bucket}/m/fingerprint.{OURS}.json"))
    assert files == {*facts["files"], f"fingerprint.{OURS}.json"}, "nothing else, such as a lock"


def test_staging_into_a_bucket_again_brings_only_what_is_missing(hub: Hub, bucket: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3", use_listings_cache=False)

    def staged(*extras: str) -> tuple[str, dict, dict[str, object], set[str]]:
        hub.asked.clear()
        done = run_command("stage_weights", f"model={OURS}", f"model.folder={bucket}/m", f"model.cache={tmp_path}",
                           f"extras=[{','.join(extras)}]")  # fmt: skip
        assert done.returncode == 0, done.stderr
        facts = json.loads(fs.cat(f"{bucket}/m/fingerprint.{OURS}.json"))
        there = fs.find(f"{bucket}/m", detail=True)
        return done.stdout, facts, {name: info["LastModified"] for name, info in there.items()}, {
            path for path, _, _ in hub.asked}  # fmt: skip

    first, facts, _, _ = staged()
    _, with_static, before, asked = staged("static")
    assert asked == {STATIC} and with_static["files"].keys() - facts["files"].keys() == {STATIC}
    checkpoint = f"{bucket.removeprefix('s3://')}/m/{CHECKPOINT}"
    again, kept, after, asked = staged()
    assert (again, kept, asked) == (first, with_static, set()), "an adapter that is there stays in the books"
    time.sleep(1.1)  # S3 tells seconds
    fs.pipe_file(checkpoint, b"cut short")
    healed, mended, last, asked = staged()
    assert asked == {CHECKPOINT} and (healed, mended) == (first, kept)
    assert {name for name in after if after[name] != last[name]} == {
        checkpoint,
        checkpoint.replace(CHECKPOINT, f"fingerprint.{OURS}.json"),
    }
    assert after.keys() == before.keys()


def test_models_share_a_text_encoder_that_lies_elsewhere(hub: Hub, bucket: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "gemma"
    elsewhere = f"model.text_encoder={shared}"
    hub.stated = {"tokenizer.json": {"git": "0" * 40}}
    spoilt = stage(tmp_path / "first", elsewhere)
    assert spoilt.returncode == 6 and not shared.exists(), "nothing has its name before its hash is checked"
    hub.stated = {}
    first = stage(tmp_path / "first", elsewhere)
    assert first.returncode == 0, first.stderr
    assert (shared / "tokenizer.json").read_bytes() == hub.repositories[GEMMA]["tokenizer.json"]
    assert placed(tmp_path / "first") == {CHECKPOINT, UPSCALER}
    assert placed(tmp_path / "shared") == {f"gemma/{name}" for name in hub.repositories[GEMMA]
                                           if name not in ("README.md", ".gitattributes")}  # fmt: skip
    hub.asked.clear()
    second = stage(tmp_path / "second", elsewhere)
    assert second.returncode == 0, second.stderr
    assert not any(path.startswith("model-") for path, _, _ in hub.asked), "the encoder is there already"
    beside = stage(tmp_path / "third")
    assert len({done.stdout.split()[-1] for done in (first, second, beside)}) == 1, "where files lie is no part of it"
    assert fingerprint(str(tmp_path / "second"), OURS) == second.stdout.split()[-1]
    there = run_command("stage_weights", f"model={OURS}", f"model.folder={bucket}/m", f"model.cache={tmp_path / 'c'}",
                        elsewhere)  # fmt: skip
    assert there.returncode == 0, there.stderr
    copy = local_copy(f"{bucket}/m", OURS, tmp_path / "c")
    assert placed(copy) == {CHECKPOINT, UPSCALER}
    (shared / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=f"changed or missing: {shared}/tokenizer.json"):
        fingerprint(str(tmp_path / "first"), OURS)


def test_a_part_in_two_folders_is_the_same_wherever_it_is_fetched_to(tmp_path: Path) -> None:
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "file").write_text(name)
    prints = set()
    for t5 in ("t5", str(tmp_path / "shared" / "t5")):
        wanted = {f"{t5}/{name}": str(tmp_path / "source" / name) for name in ("text_encoder", "tokenizer")}
        known = fetch(tmp_path / "model", wanted, on_start=lambda total, there: None, on_bytes=lambda count: None)
        assert known.keys() == {f"{name}/file" for name in wanted}
        prints.add(stage_files(tmp_path / "model", "m", {"text_encoder": t5}, {}, {}))
    assert len(prints) == 1, "a fetch's lock is none of the part's files"


def test_parts_come_from_a_folder_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    assert stage(tmp_path / "first").returncode == 0
    shutil.move(tmp_path / "first" / CHECKPOINT, tmp_path / "elsewhere")
    assert stage(tmp_path / "first", f"model.sources.checkpoint={tmp_path / 'elsewhere'}").returncode == 0


def test_a_folder_that_cannot_be_written_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file is in the way")
    done = stage(tmp_path / "model")
    assert_refused(done, "model.folder must be writable", str(tmp_path / "model"))
