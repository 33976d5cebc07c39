"""Rebuild the summary and the HTML report of a run, or follow a running one."""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import sys
import time

from jobs.entry import ReportJob, compose_job, run_job
from pipeline.errors import UsageError
from pipeline.report.rebuild import progress_line, rebuild
from pipeline.storage.store import open_store

FOLLOW_EVERY_S = 2.0


def main(argv: list[str]) -> int:
    job = compose_job(ReportJob, "report", argv)
    output, _, run_id = job.run.rstrip("/").rpartition("/runs/")
    if not output or "/" in run_id:
        raise UsageError(f"run must be <output>/runs/<run_id>, got {job.run!r}; give the run's folder")
    store = open_store(output)
    going = job.follow
    while going:
        line, going = progress_line(store, run_id)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if going:
            rebuild(store, run_id)
            time.sleep(FOLLOW_EVERY_S)
    report = rebuild(store, run_id)
    sys.stdout.write(f"{report.text}\nreport: {report.page}\n")
    return 0


if __name__ == "__main__":
    run_job(main)
