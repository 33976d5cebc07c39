"""`jobs.render` with the engine of `engine.py`, so that a thousand kills cost minutes: python -m tests.chaos.farm.

Its own options: `--step_s=0.01` a step; `--kill_at="2 before create run.json"` ends the process by SIGKILL at the
second edge of that name (`edges.py`); `--edges=FILE` writes all edges of this run there; `--ranks=2` makes each worker
a gang of so many. Everything else is as on `jobs.render`'s command line.
"""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, as in jobs.render

# isort: split

from functools import partial

from jobs.entry import RenderJob, compose_job, compose_recipes, run_job
from jobs.render import stop_on_signals
from pipeline.assembly import driver_side
from pipeline.assembly.driver_side import Run, make_plan
from pipeline.config.parallel import ParallelConfig
from pipeline.storage.models import NOT_STAGED
from pipeline.storage.store import open_store
from tests.chaos.edges import Edges
from tests.chaos.engine import build_colour_worker


def main(argv: list[str]) -> int:
    options = dict(argument[2:].split("=", 1) for argument in argv if argument.startswith("--"))
    overrides = [argument for argument in argv if not argument.startswith("--")]
    job = compose_job(RenderJob, "render", overrides)
    # After composition, which asks if the model can be split so: this engine does not mind.
    job.parallel = ParallelConfig(ring=int(options.get("ranks", "1")))
    recipes = compose_recipes("render", overrides)
    open_output = open_store
    if "kill_at" in options or "edges" in options:
        # In one process only: what happens in an actor is not this process's edge.
        edges = Edges(options.get("kill_at"), options.get("edges"))
        open_output = edges.open
        driver_side.open_store = edges.open  # type: ignore[assignment]
    manifest, plan = make_plan(job, recipes, NOT_STAGED)
    build = partial(build_colour_worker, float(options.get("step_s", "0.005")), open_output)
    stop = stop_on_signals(job.cluster.stop_notice_s)
    return Run(job, recipes.usable, NOT_STAGED, manifest, plan, stop, build).execute()


if __name__ == "__main__":
    run_job(main)
