"""Rebuild the summary and the HTML report of a run, or follow a running one."""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import sys
import time

from jobs.entry import ReportJob, compose_job, run_job
from pipeline.report.rebuild import progress_line, rebuild
from pipeline.storage.filesystem import local_path

FOLLOW_EVERY_S = 2.0


def main(argv: list[str]) -> int:
    job = compose_job(ReportJob, "report", argv)
    folder = local_path(job.run)
    going = job.follow
    while going:
        line, going = progress_line(folder)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if going:
            rebuild(folder)
            time.sleep(FOLLOW_EVERY_S)
    sys.stdout.write(rebuild(folder).text + "\n")
    sys.stdout.write(f"report: {folder / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    run_job(main)
