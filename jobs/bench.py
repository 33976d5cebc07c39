"""Measure: `python -m jobs.bench write|clip|batch|latency|step|profile|gang|decode|kernel|encode|table [key=value]...`

`write` makes a model's files from random numbers in the published layout and size; `clip` renders one clip with them,
or with the real ones, through `jobs.render` on Ray, `batch` as many as `num_clips`. `step`, `decode`, `kernel` and
`latency` draw their weights themselves and time our tiers, our peers, each kernel, and whole clips of a worker that has
its model, beside what the device can do; `profile` says which kernels a step's time is spent in; `gang` times tiers and
peers on several GPUs of this host beside one; `encode` times x264. Each adds dated rows, with hardware and versions, to
a file of its name in `results`; `table` prints the README's table of them.
"""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jobs.entry import CONF, EXIT_BUG, FLAGS, BenchJob, RenderJob, compose_job, run_job
from jobs.stage_weights import stage_model
from pipeline.bench.batch import batch_facts
from pipeline.bench.rows import Row, append, hardware
from pipeline.bench.shapes import clips_named
from pipeline.bench.table import performance_table
from pipeline.config.model import ModelConfig
from pipeline.errors import EngineFault, UsageError
from pipeline.geometry import PixelShape, latent_shape
from pipeline.media.probe import check_clip, probe_clip
from pipeline.storage.filesystem import local_path
from pipeline.storage.manifest import write_manifest
from pipeline.storage.models import staged_bytes
from pipeline.storage.runs import read_events, read_run
from pipeline.storage.store import Store, open_store
from pipeline.storage.tables import read_ledger, read_rows

SEED = 20261120
PROMPT = "a lighthouse on a cliff in a storm, waves breaking, thunder rolling, cinematic"
SHAPES = ("768x512x121", "1920x1088x121")
STAGES = ("text_encode_s", "denoise_s", "upsample_s", "decode_s", "encode_s", "upload_s", "wall_s")
_OWN_KEYS = {field.name for field in fields(BenchJob)}


def main(argv: list[str]) -> int:
    what, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if what in FLAGS:
        compose_job(BenchJob, "bench", argv)
    if what not in WHAT:
        *first, last = WHAT
        known = f"{', '.join(first)} or {last}"
        raise UsageError(f"jobs.bench must be told what to do: {known}, got {what!r}; see --help")
    own = [a for a in arguments if a in FLAGS or a.partition("=")[0].partition(".")[0] in _OWN_KEYS]
    others = [a for a in arguments if a not in own]
    job = compose_job(BenchJob, "bench", own)
    if job.folder is not None:
        job = replace(job, model=replace(job.model, folder=job.folder))
    return WHAT[what](job, [a for a in own if a.startswith("model")], others)


def write(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Write what `folder` lacks of the model's files, random, and stage them."""
    if others or job.folder is None:
        raise UsageError(f"jobs.bench write must be given model= and folder= alone, got {others}; see --help")
    if job.model.built_here:
        stage_model(job.model, {})
        return 0
    # Torch loads only where weights are written.
    from pipeline.engine.random_weights import layout_of, quantised

    published = _published(job.model)
    folder = Path(job.folder)
    for part in ("checkpoint", "spatial_upscaler"):
        facts = published[part]
        layout = layout_of(facts["tensors"])
        if part == "checkpoint" and job.model.name.endswith("_fp8"):
            first, last = published["fp8_blocks"]
            layout = quantised(layout, (first, last))
        _write(folder / job.model.parts()[part], layout, {"config": json.dumps(facts["config"])})
    _write_text_encoder(folder / job.model.text_encoder, published["text_encoder"])
    fingerprint = stage_model(replace(job.model, sources={}), {})
    sys.stdout.write(f"{job.model.name}, random, staged in {folder}, fingerprint {fingerprint}\n")
    return 0


def _published(model: ModelConfig) -> dict[str, Any]:
    """The description of the published file that `model` is a variant of."""
    paths = [path for path in (CONF / "published").glob("*.json") if model.name.startswith(path.stem)]
    if not paths:
        known = ", ".join(sorted(path.stem for path in (CONF / "published").glob("ltx*.json")))
        raise UsageError(f"model must be of a kind whose layout is known ({known}), got {model.name!r}; see --help")
    return dict(json.loads(paths[0].read_text()))


def _write(path: Path, layout: Any, metadata: dict[str, str]) -> None:
    from pipeline.engine.random_weights import best_device, write_random

    if path.exists():
        sys.stderr.write(f"{path} is there and stays\n")
        return
    started_s = time.monotonic()
    size_bytes = write_random(path, layout, metadata, device=best_device(), seed=SEED)
    seconds = time.monotonic() - started_s
    sys.stderr.write(f"{path}: {size_bytes / 1e9:.2f} GB in {seconds:.1f} s\n")


def _write_text_encoder(folder: Path, name: str) -> None:
    """A text encoder of the published architecture, with the nano model's tokenizer. T5 has two folders in one.

    Made beside `folder` and renamed; a folder with anything in it stays as it is, since it may be a real model's.
    """
    if folder.is_dir() and any(folder.iterdir()):
        sys.stderr.write(f"{folder} is there and stays\n")
        return
    from pipeline.engine.nano import TEXT_ENCODER, build_nano
    from pipeline.engine.random_weights import layout_of

    facts = json.loads((CONF / "published" / f"{name}.json").read_text())
    is_t5 = facts["config"]["model_type"] == "t5"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    weights, words = (unfinished / "text_encoder", unfinished / "tokenizer") if is_t5 else (unfinished, unfinished)
    _write(weights / "model.safetensors", layout_of(facts["tensors"]), {"format": "pt"})
    (weights / "config.json").write_text(json.dumps(facts["config"], indent=2))
    words.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as nano:
        build_nano(Path(nano))
        for file in (Path(nano) / TEXT_ENCODER).glob("tokenizer*"):
            shutil.copy(file, words / file.name)
    unfinished.rename(folder)


def clip(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Render one clip through `jobs.render` on Ray and add a row of what it took."""
    one = [] if any(argument.startswith("cluster=") for argument in others) else ["cluster.num_workers=1"]
    run = _rendered(job, model_arguments, [*one, *others], [PROMPT])
    if not run.rows:  # it said why on stderr
        return run.exit_code
    (row,) = run.rows
    load_s = sum(entry.gpu_seconds for entry in read_ledger(run.store, run.run_id) if entry.state == "weight_load")
    num_bytes = staged_bytes(job.model.folder, job.model.name, job.model.parts().values())
    measured = {
        "at": run.began.isoformat(timespec="seconds"),
        "what": "clip",
        **{name: row[name] for name in ("status", "model", "recipe", "precision", "error_message")},
        **_size(job),
        "arguments": others,
        "exit_code": run.exit_code,
        "load_s": load_s,
        "load_gb": num_bytes / 1e9,
        "load_gb_per_s": num_bytes / 1e9 / load_s if load_s else None,
        # From an empty process to the commit.
        "first_clip_s": (row["finished_at"] - run.began).total_seconds() if row["status"] == "rendered" else None,
        **{name: row[name] for name in (*STAGES, "peak_gpu_memory_bytes", "peak_host_memory_bytes")},
        "gpu_memory_limit_gb": job.gpu_memory_limit_gb,
        "playable": _is_playable(row),
        "hardware": hardware(),
        "versions": read_run(run.store, run.run_id)["versions"],
    }
    append(Path(job.results), measured)
    sys.stdout.write(json.dumps(measured, indent=1) + "\n")
    return run.exit_code


def batch(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Render `num_clips` clips of one shape through `jobs.render` on Ray and add a row of how fast they came."""
    # Each has a prompt of its own: that of one clip is not encoded again for the next.
    run = _rendered(job, model_arguments, others, [f"{PROMPT}, take {take}" for take in range(1, job.num_clips + 1)])
    if not run.rows:  # it said why on stderr
        return run.exit_code
    first, *_ = run.rows
    measured = {
        "at": run.began.isoformat(timespec="seconds"),
        "what": "batch",
        **{name: first[name] for name in ("model", "recipe", "precision")},
        **_size(job),
        "num_clips": job.num_clips,
        "arguments": others,
        "exit_code": run.exit_code,
        **batch_facts(run.rows, read_ledger(run.store, run.run_id), read_events(run.store, run.run_id)),
        "gpu_memory_limit_gb": job.gpu_memory_limit_gb,
        "hardware": hardware(),
        "versions": read_run(run.store, run.run_id)["versions"],
    }
    append(Path(job.results), measured)
    sys.stdout.write(json.dumps(measured, indent=1) + "\n")
    return run.exit_code


class _Run(NamedTuple):
    """A run of `jobs.render` that has ended; without rows it did not come to rendering."""

    began: datetime
    store: Store
    run_id: str
    exit_code: int
    rows: list[dict[str, Any]]


def _rendered(job: BenchJob, model_arguments: list[str], others: list[str], prompts: Sequence[str]) -> _Run:
    """One clip for each prompt, rendered anew by a process of its own."""
    now = datetime.now(UTC)
    run_id = f"bench-{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    manifest = local_path(job.output) / f"{run_id}.parquet"
    rows = [
        {"id": f"bench-{index}", "prompt": prompt, "seed": SEED + index, **_size(job)}
        for index, prompt in enumerate(prompts)
    ]
    write_manifest(manifest, rows)
    arguments = [f"manifest={manifest}", f"output={job.output}", f"run_id={run_id}", "resume=false", *model_arguments]
    if not any(argument.startswith("cluster=") for argument in others):
        arguments.append("cluster=local")
    if job.folder is not None:
        arguments.append(f"model.folder={job.folder}")
    if job.gpu_memory_limit_gb is not None:
        arguments.append(f"cluster.gpu_memory_limit_gb={job.gpu_memory_limit_gb}")
    began = datetime.now(UTC)
    done = subprocess.run([sys.executable, "-m", "jobs.render", *arguments, *others], check=False)
    store = open_store(job.output)
    found = read_rows(store, f"runs/{run_id}/results")
    return _Run(began, store, run_id, done.returncode, found)


def _size(job: BenchJob) -> dict[str, int]:
    return {"width": job.width, "height": job.height, "num_frames": job.num_frames}


def _is_playable(row: dict[str, Any]) -> bool:
    """If the clip decodes to its last frame and is what was asked for."""
    if row["status"] != "rendered":
        return False
    try:
        facts = probe_clip(local_path(row["uri"]))
        asked = {name: row[name] for name in ("width", "height", "num_frames", "fps")}
        check_clip(facts, **asked, sample_rate_hz=row["sample_rate_hz"] or 0)
    except EngineFault:
        return False
    return True


def step(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Time one denoiser step of each contestant."""
    _refuse("step", others)
    shapes = {name: latent_shape(clip) for name, clip in _clips(job, SHAPES).items()}
    # Torch and the peers' code load only where something is measured.
    from pipeline.bench.step import chosen, measure_steps
    from pipeline.engine.random_weights import best_device

    section = _metadata(job.model)["transformer"]
    contestants, device = chosen(job.contestants), best_device()
    return _record(job, measure_steps(section, job.model, shapes, contestants, device, job.repeats))


def profile(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Say what the device does in one denoiser step of each contestant."""
    _refuse("profile", others)
    shapes = {name: latent_shape(clip) for name, clip in _clips(job, SHAPES).items()}
    from pipeline.bench.profile import DEFAULT, measure_profiles
    from pipeline.bench.step import chosen
    from pipeline.engine.random_weights import best_device

    contestants = DEFAULT if job.contestants is None else chosen(job.contestants)
    return _record(
        job, measure_profiles(_metadata(job.model)["transformer"], job.model, shapes, contestants, best_device())
    )


def gang(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Time one denoiser step, and the decoding, of a clip that is spread over several GPUs of this host."""
    _refuse("gang", others)
    shapes = {name: latent_shape(clip) for name, clip in _clips(job, SHAPES).items()}
    from pipeline.bench.gang import gang_jobs, measure_gangs
    from pipeline.engine.random_weights import best_device

    config = _metadata(job.model)
    return _record(
        job, measure_gangs(gang_jobs(config, job.model, shapes, job.layouts, job.contestants, best_device()))
    )


def decode(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Time the decoding of a latent by each way that takes part."""
    _refuse("decode", others)
    shapes = _clips(job, SHAPES)
    from pipeline.bench.decode import measure_decodes, ways_named
    from pipeline.engine.random_weights import best_device

    ways = ways_named(job.contestants)
    return _record(job, measure_decodes(_metadata(job.model), job.model, shapes, ways, best_device()))


def kernel(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Time each operation alone."""
    _refuse("kernel", others)
    shapes = {name: latent_shape(clip) for name, clip in _clips(job, SHAPES).items()}
    from pipeline.bench.kernel import measure_kernels
    from pipeline.engine.random_weights import best_device

    return _record(job, measure_kernels(_metadata(job.model)["transformer"], job.model, shapes, best_device()))


def latency(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Time whole clips of each contestant in this process; `others` are `recipe=` and settings of it."""
    strange = [each for each in others if each.partition("=")[0].partition(".")[0] != "recipe"]
    _refuse("latency", strange)
    recipe = compose_job(RenderJob, "render", [*model_arguments, *others]).recipe
    shapes = _clips(job, SHAPES[-1:])
    from pipeline.bench.latency import LatencyPlan, chosen, measure_latency
    from pipeline.engine.random_weights import best_device

    limit_gb = job.gpu_memory_limit_gb
    plan = LatencyPlan(job.model, recipe, chosen(job.contestants), job.repeats, limit_gb is not None, limit_gb)
    with tempfile.TemporaryDirectory() as folder:
        metadata = _metadata(job.model), _metadata(job.model, "spatial_upscaler")
        return _record(job, measure_latency(*metadata, plan, shapes, Path(folder), best_device()))


def encode(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Time x264 with a recipe's settings; `others` are settings of `jobs.render`, such as `recipe.encode.crf=20`."""
    recipe = compose_job(RenderJob, "render", [*model_arguments, *others]).recipe
    from pipeline.bench.encode import measure_encode

    row = measure_encode(recipe.encode, **_size(job))
    append(Path(job.results), row)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")
    return 0


def table(job: BenchJob, model_arguments: list[str], others: list[str]) -> int:
    """Print the README's table of the rows in `results`."""
    _refuse("table", others)
    sys.stdout.write(performance_table(Path(job.results)))
    return 0


def _refuse(what: str, others: list[str]) -> None:
    if others:
        raise UsageError(f"jobs.bench {what} must be given settings of its own alone, got {others}; see --help")


def _clips(job: BenchJob, default: Sequence[str]) -> dict[str, PixelShape]:
    return clips_named(default if job.shapes is None else job.shapes, job.model.clip.fps)


def _metadata(model: ModelConfig, part: str = "checkpoint") -> dict[str, Any]:
    """What a file of the model says of its parts."""
    if model.built_here:
        from pipeline.engine.nano import CONFIG, UPSCALER_CONFIG

        return UPSCALER_CONFIG if part == "spatial_upscaler" else CONFIG
    return dict(_published(model)[part]["config"])


def _record(job: BenchJob, rows: Iterable[Row]) -> int:
    """Keep and print each row as it comes. 1 if one of them cannot be: that is a bug of the measurement."""
    errors = 0
    for row in rows:
        append(Path(job.results), row)
        for what in ("layout", "ceilings", "exchanges"):
            if what in row:
                sys.stdout.write(f"{row['shape']} {what}: {json.dumps(row[what])}\n")
        for name, facts in row["contestants"].items():
            sys.stdout.write(f"{row['shape']} {name}: {json.dumps(facts)}\n")
            errors += "error" in facts
    return EXIT_BUG if errors else 0


WHAT: dict[str, Callable[[BenchJob, list[str], list[str]], int]] = {
    "write": write, "clip": clip, "batch": batch, "latency": latency, "step": step, "profile": profile, "gang": gang,
    "decode": decode, "kernel": kernel, "encode": encode, "table": table,
}  # fmt: skip


if __name__ == "__main__":
    run_job(main)
