"""Render a manifest: Parquet rows in, MP4s, results and a ledger out. `--help` lists the settings."""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from jobs.entry import RenderJob, compose_job, compose_recipes, run_job
from jobs.interrupts import EXIT_INTERRUPTED, STOPPING
from jobs.quote import quote_job
from jobs.stage_weights import stage_model
from pipeline.assembly.driver_side import Run, make_plan
from pipeline.cluster.ending import StopRequest
from pipeline.cluster.progress import say
from pipeline.errors import UsageError
from pipeline.planning.reach import in_submitted_job, refuse_lost_paths
from pipeline.storage.filesystem import is_local
from pipeline.storage.models import fingerprint

# What of the notice is kept: the process ends so long before it is over, and clips may go on until so long before.
SPARE_S, CLOSING_S = 0.8, 2.4


def main(argv: list[str]) -> int:
    job = compose_job(RenderJob, "render", argv)
    if in_submitted_job(os.environ):
        refuse_lost_paths(job, in_package=lambda path: Path(path).exists() or any(Path().glob(path)))
    recipes = compose_recipes("render", argv)
    if job.dry_run:
        return quote_job(job, recipes)
    model_fingerprint = _staged(job)
    manifest, plan = make_plan(job, recipes, model_fingerprint)
    return Run(
        job, recipes.usable, model_fingerprint, manifest, plan, stop_on_signals(job.cluster.stop_notice_s)
    ).execute()


def _staged(job: RenderJob) -> str:
    """The model's fingerprint; the model that this project builds itself is built on first use, on a disk only."""
    try:
        return fingerprint(job.model.folder, job.model.name)
    except UsageError:
        if not job.model.built_here or not is_local(job.model.folder):
            raise
        return stage_model(job.model, {})


def stop_on_signals(notice_s: float) -> StopRequest:
    """Ask the driver to stop at the first Ctrl-C, SIGTERM or hang-up; a second one ends the process at once."""
    stop = StopRequest(notice_s=notice_s - CLOSING_S)

    def ask(signum: int, frame: FrameType | None) -> None:
        if stop.reason is not None:
            os._exit(EXIT_INTERRUPTED)
        stop.reason = f"interrupted ({signal.Signals(signum).name}); the same command goes on from here"
        # Closing the books takes moments, but a store that does not answer, or a busy machine, may hold them up: what
        # is written is whole at any time, so the process can end without them.
        last = threading.Timer(notice_s - SPARE_S, _end_now, (stop.reason,))
        last.daemon = True
        last.start()
        say(sys.stderr, "\nstopping: what is committed stays, the rest is resumable")

    for signum in STOPPING:
        signal.signal(signum, ask)
    return stop


def _end_now(reason: str) -> None:
    """End the process with what its last line would have been."""
    os.write(2, f"{reason}\n".encode())
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    run_job(main)
