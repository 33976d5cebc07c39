"""Errors of a precision tier against the exact one, on a model's files, whatever is in them: one JSON line on stdout.

`python -m tests.bench.tier_errors [--size 1920x1088x121] [--levels 0.909375 0.725 0.421875 0] OVERRIDE ...` with the
overrides of `jobs.render`, such as `model=ltx2_19b_distilled model.folder=/models precision=fast`. Files of random
numbers show what numbers lose, and nothing about the choice of blocks (`tests/tier_errors.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import torch

from jobs.entry import RenderJob, compose_job
from pipeline.assembly.worker_side import operations
from pipeline.config.model import PrecisionConfig
from pipeline.config.recipe import StageConfig
from pipeline.engine.engine import RenderEngine
from pipeline.engine.loading import load_engine
from pipeline.geometry import PixelShape
from tests.tier_errors import error_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="512x320x121", help="width x height x frames, on the model's grid")
    parser.add_argument("--levels", type=float, nargs="*", default=[0.909375, 0.725, 0.421875, 0.0])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    width, height, num_frames = (int(count) for count in arguments.size.split("x"))
    job = compose_job(RenderJob, "render", arguments.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(precision: PrecisionConfig) -> RenderEngine:
        if device == "cuda":
            torch.cuda.empty_cache()
        return load_engine(job.model, precision, device=device, ops=operations(precision, device))

    report = error_report(
        lambda: load(PrecisionConfig()),
        lambda: load(job.precision),
        StageConfig(sigmas=arguments.levels, family=job.model.family),
        PixelShape(num_frames, height, width, 24.0),
    )
    facts = {"model": job.model.name, "device": device, "size": arguments.size, "precision": job.precision.name}
    sys.stdout.write(json.dumps(facts | dataclasses.asdict(report)) + "\n")


if __name__ == "__main__":
    main()
