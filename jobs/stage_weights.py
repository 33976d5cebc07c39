"""Place a model's files and their fingerprint on this node. Builds the `nano` model, whose files are our own.

That one may also go straight into a bucket; published files are staged on a disk and copied.
"""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from jobs.entry import StageWeightsJob, compose_job, run_job
from pipeline.config.model import ModelConfig
from pipeline.errors import UsageError
from pipeline.storage.filesystem import is_local, local_path
from pipeline.storage.models import copy_to, stage


def stage_model(model: ModelConfig) -> str:
    """Make sure that the files of `model` are there, building them if this project can; returns the fingerprint."""
    if not is_local(model.folder):
        return _stage_in_bucket(model)
    folder = local_path(model.folder)
    parts = {
        "checkpoint": model.checkpoint,
        "text_encoder": model.text_encoder,
        "spatial_upscaler": model.spatial_upscaler,
    }
    if model.built_here and not all((folder / name).exists() for name in parts.values()):
        # Torch loads only where it is needed: staging published files is hashing.
        from pipeline.engine.nano import build_nano

        sys.stderr.write(f"building the {model.name} model in {folder}\n")
        build_nano(folder)
    return stage(folder, model.name, parts)


def _stage_in_bucket(model: ModelConfig) -> str:
    if not model.built_here:
        raise UsageError(
            f"model.folder must be on a disk to stage {model.name}, got {model.folder!r}; stage it where its files "
            "lie and copy that folder there, its fingerprint file last"
        )
    with tempfile.TemporaryDirectory() as folder:
        fingerprint = stage_model(replace(model, folder=folder))
        copy_to(model.folder, Path(folder))
    return fingerprint


def main(argv: list[str]) -> int:
    job = compose_job(StageWeightsJob, "stage_weights", argv)
    fingerprint = stage_model(job.model)
    sys.stdout.write(f"{job.model.name} staged in {job.model.folder}, fingerprint {fingerprint}\n")
    return 0


if __name__ == "__main__":
    run_job(main)
