"""What a render with the same settings would admit, reject, take and cost. Needs no GPU and no torch."""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

from jobs.entry import RenderJob, compose_job, compose_recipes, run_job
from jobs.quote import quote_job


def main(argv: list[str]) -> int:
    return quote_job(compose_job(RenderJob, "estimate", argv), compose_recipes("estimate", argv))


if __name__ == "__main__":
    run_job(main)
