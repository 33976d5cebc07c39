"""What a render with the same settings would admit, reject, take and cost. Needs no GPU and no torch."""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import sys
from pathlib import Path

from jobs.entry import RenderJob, compose_job, compose_recipes, run_job
from jobs.quote import print_quote
from pipeline.assembly.driver_side import make_plan
from pipeline.errors import UsageError
from pipeline.storage.models import fingerprint


def main(argv: list[str]) -> int:
    job = compose_job(RenderJob, "estimate", argv)
    recipes = compose_recipes("estimate", argv)
    try:
        model_fingerprint = fingerprint(Path(job.model.folder), job.model.name)
    except UsageError:
        # Without its files nothing can be known to be done; the quote is then for all rows, and says so.
        sys.stdout.write(f"model {job.model.name} is not staged here: every valid row counts as still to render\n")
        model_fingerprint = "not staged"
    manifest, plan = make_plan(job, recipes, model_fingerprint)
    return print_quote(job, manifest, plan)


if __name__ == "__main__":
    run_job(main)
