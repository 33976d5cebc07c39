"""The composition root of a driver: configuration to a planned, running and closed run. Loads no torch itself.

The factory handed to workers imports the worker's root where it is called, so torch loads in workers only.
"""

from __future__ import annotations

import gc
import math
import platform
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.assembly.brief import WorkerBrief
from pipeline.assembly.closing import charge, count_statuses, exit_code, rejected_rows, results_rows, totals
from pipeline.assembly.model_facts import model_facts
from pipeline.cluster.driver import Driver
from pipeline.cluster.ending import Ending, StopRequest
from pipeline.cluster.gpu_memory import smallest_gpu_bytes
from pipeline.cluster.local_pool import LocalPool
from pipeline.cluster.pool import Pool, Worker
from pipeline.cluster.progress import Counts, Progress, say
from pipeline.config.cluster import Price
from pipeline.config.jobs import RenderJob
from pipeline.config.parallel import USUAL_GPUS_PER_NODE, guidance_misfit, tier_misfit
from pipeline.config.recipe import RecipeConfig, Recipes
from pipeline.config.tree import to_plain
from pipeline.cost.allocation import allocate
from pipeline.cost.meter import Meter, utc_clock
from pipeline.cost.pricing import UnitPrice, stale_price_warning, unit_price
from pipeline.errors import Interrupted, PipelineError, UsageError
from pipeline.planning.estimate import Estimator
from pipeline.planning.memory import bytes_of_a_number, demands
from pipeline.planning.offers import Menu, layouts_up_to
from pipeline.planning.pace import Pace
from pipeline.planning.plan import Plan, Planner, Selection, resolved
from pipeline.planning.policy import Admission
from pipeline.planning.queue import WorkQueue
from pipeline.planning.reach import refuse_scattered_output
from pipeline.planning.spread import Machine
from pipeline.records.gang import Member
from pipeline.records.outcome import NS_PER_S, Rendered, RunFacts, WorkerSeat, adopting, timestamp
from pipeline.records.parallel import ParallelLayout
from pipeline.records.request import RenderRequest, RequestLimits
from pipeline.report.rebuild import rebuild
from pipeline.storage.assets import AssetStore, RunningIndex
from pipeline.storage.manifest import Manifest, open_manifest
from pipeline.storage.models import NOT_STAGED
from pipeline.storage.patience import Patience
from pipeline.storage.runs import FLUSH_EVERY_S, RunFolder, close_dead_runs
from pipeline.storage.store import open_store

_REPORTED_PACKAGES = ("torch", "diffusers", "transformers", "av", "pyarrow", "hydra-core", "ray", "flash-attn-4")


def worker_device(job: RenderJob) -> str:
    """The device workers will use, found without torch: the driver's `nvidiactl` is there iff a GPU is."""
    if job.cluster.device != "auto":
        return job.cluster.device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def worker_price(job: RenderJob, device: str) -> Price:
    return job.pricing.gpu if device == "cuda" else job.pricing.cpu_worker


def worker_tflops(job: RenderJob, device: str) -> float:
    """The rate that a worker is assumed to compute at."""
    return job.cluster.assumed_gpu_tflops if device == "cuda" else job.cluster.assumed_cpu_tflops


def planner(job: RenderJob, recipes: Recipes, fingerprint: str) -> Planner:
    device, size = worker_device(job), job.model.size
    facts = model_facts(job.model, is_staged=fingerprint != NOT_STAGED)

    def misfit_of(recipe: RecipeConfig) -> str:
        misfit: str = facts["misfit"](recipe)
        return misfit or guidance_misfit(job.parallel.layout, recipe, has_audio=size.has_audio)

    return Planner(
        recipes=recipes.usable,
        unusable=recipes.unusable,
        default_recipe=job.recipe.name,
        precision=job.precision,
        model=job.model,
        fingerprint=fingerprint,
        limits=RequestLimits(job.limits.max_side_px, job.limits.max_duration_s),
        estimator=Estimator(
            size,
            Machine(worker_tflops(job, device), job.cluster.assumed_link_gb_per_s, bytes_of_a_number(job.precision)),
            unit_price(worker_price(job, device)),
            job.precision,
        ),
        menu=_menu(job, device),
        **{**facts, "misfit": misfit_of},
    )


def _menu(job: RenderJob, device: str) -> Menu:
    """The layouts that clips may get. How large the nodes of a cluster are is known for certain once Ray is up."""
    cluster = job.cluster
    if not job.parallel.auto or cluster.pool == "in_process":
        return Menu((job.parallel.layout,))
    most = min(cluster.gpus_per_node or USUAL_GPUS_PER_NODE, cluster.num_workers or USUAL_GPUS_PER_NODE)
    card_gb = cluster.gpu_memory_limit_gb or cluster.gpu_memory_gb
    card_bytes = card_gb * 1e9 if card_gb is not None else smallest_gpu_bytes() if device == "cuda" else None
    layouts = layouts_up_to(most, job.model.size)
    return Menu(tuple(layout for layout in layouts if not tier_misfit(layout, job.precision)), card_bytes)


def make_plan(job: RenderJob, recipes: Recipes, fingerprint: str) -> tuple[Manifest, Plan]:
    """Read and judge the manifest, and see what is done; writes nothing."""
    planning = planner(job, recipes, fingerprint)
    if reason := planning.misfit(job.recipe):
        suiting = (
            ", ".join(name for name, recipe in recipes.usable.items() if not planning.misfit(recipe)) or "another model"
        )
        raise UsageError(f"recipe must suit model {job.model.name}, got {job.recipe.name}: {reason}; use {suiting}")
    manifest = open_manifest(job.manifest)
    store = AssetStore(open_store(job.output, answer_timeout_s=job.storage.answer_timeout_s))

    def committed(keys: Collection[str]) -> Mapping[str, Mapping[str, Any]]:
        return store.committed(keys) if job.resume else {}

    selection = Selection(None if job.ids is None else tuple(job.ids), job.limit)
    with _lasting_objects():
        plan = planning.plan(planning.intake(manifest.rows()), selection, committed)
    return manifest, plan


@contextmanager
def _lasting_objects() -> Iterator[None]:
    """For making millions of objects that stay: to look for garbage among them takes a quarter of the time it takes to
    make them, and a second of the driver's time again and again after that."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _build_worker(brief: WorkerBrief, meter: Meter, member: Member) -> Worker:
    # Imported where it is called: this is what loads torch, and only a worker needs it.
    from pipeline.assembly.worker_side import build_worker

    return build_worker(brief, meter, member)


@dataclass
class Run:
    """One start of one driver, from its plan to its report."""

    job: RenderJob
    recipes: dict[str, RecipeConfig]
    fingerprint: str
    manifest: Manifest
    plan: Plan
    stop: StopRequest
    build_worker: Callable[[WorkerBrief, Meter, Member], Worker] = _build_worker

    def __post_init__(self) -> None:
        self._now_ns = utc_clock()
        self._started_ns = self._now_ns()
        self._device = worker_device(self.job)
        self._price = unit_price(worker_price(self.job, self._device))
        self.store = open_store(self.job.output, answer_timeout_s=self.job.storage.answer_timeout_s)
        # For what a run has made already: a store that is away for minutes must not cost it.
        self._patience = Patience(self.job.storage.patience_s, self._pause)
        at = timestamp(self._started_ns).strftime("%Y%m%dT%H%M%S")
        self.run_id = self.job.run_id or f"{at}-{secrets.token_hex(3)}"
        self.facts = RunFacts(self.run_id, self.job.model.name, self.fingerprint, self.job.precision.name)

    def execute(self) -> int:
        """Drive the plan to its end and close the books; returns the exit code (README, "The contract")."""
        self.store.prepare()
        x_values = self.manifest.x_values()
        patient = self.store.with_patience(self._patience)
        self._assets = AssetStore(patient)
        self._index = RunningIndex(self._assets, self.run_id)
        folder = self._folder = RunFolder(patient, self.run_id)
        folder.open(self._run_facts(), self._now_ns())
        try:
            closed = close_dead_runs(self.store, self._now_ns(), self._cost_of, self.run_id)
            say(sys.stderr, f"run {self.run_id}; follow it with: python -m jobs.report run={folder.shown} follow=true")
            for run_id in closed:
                folder.log("closed_dead_run", self._now_ns(), run_id=run_id)
            warning = stale_price_warning(worker_price(self.job, self._device), datetime.now(UTC).date())
            if warning is not None:
                say(sys.stderr, f"warning: {warning}")
            for row in rejected_rows(self.plan, self.facts):
                folder.log("rejected", self._now_ns(), id=row["id"], row=row)
            ending = self._driver(folder).drive()
            self._index.close(wait=not isinstance(ending.stopped_by, Interrupted))
            return self._finish(folder, ending, x_values)
        except BaseException as error:
            code = error.exit_code if isinstance(error, PipelineError) else 1
            with suppress(PipelineError):  # the disk may be what failed
                folder.update({"state": "failed", "exit_code": code, "finished_at": self._timestamp()})
            raise

    def _driver(self, folder: RunFolder) -> Driver:
        queued_ns = self._now_ns()
        plan = self.plan
        return Driver(
            queue=WorkQueue(replace(item, queued_ns=queued_ns) for item in plan.to_render),
            pool=self._pool(),
            log=folder,
            facts=self.facts,
            admission=Admission(self.job.budget_usd, self.job.deadline_ns, self.job.max_failed_rows),
            stop=self.stop,
            counts=Counts(len(plan.to_render), len(plan.done), len(plan.rejected)),
            progress=Progress(sys.stderr),
            now_ns=self._now_ns,
            flush_every_s=FLUSH_EVERY_S,
            # Two attempts at one clip would write the same names where the store cannot tell them apart.
            pace=Pace() if self.store.is_exclusive else Pace(straggler_at_least_s=math.inf),
            committed=lambda item: self._assets.standing(item.key),
            commit=self._commit,
            on_rendered=self._index.note,
        )

    def _pause(self, wait_s: float) -> bool:
        """Wait for a store to come back, but not once somebody has asked the run to stop."""
        end_s = time.monotonic() + wait_s
        while self.stop.reason is None and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.1))
        return self.stop.reason is None

    def _commit(self, rendered: Rendered) -> Rendered:
        """Commit for a worker that may not, because only one process at a time may where `create` is not exclusive."""
        assert rendered.record is not None
        self._folder.require_output(self._now_ns())
        return adopting(rendered, self._assets.commit(rendered.item.key, rendered.record), self.run_id)

    def _pool(self) -> Pool:
        kinds = self._demands()
        brief = WorkerBrief(self.job, self.recipes, self.facts, self._device, kinds, self.store.is_exclusive)
        factory = partial(self.build_worker, brief)
        cluster = self.job.cluster
        if cluster.pool == "in_process":
            return LocalPool(factory, self._acquire, hang_after_s=cluster.hang_after_s)
        num_workers, gpus_of_each = cluster.num_workers, self.job.parallel.layout.num_gpus
        # Imported where it is called: Ray loads only when it is asked for.
        from pipeline.cluster.ray_pool import RayPool
        from pipeline.cluster.worker_plan import WorkerPlan

        plan = WorkerPlan(
            run_id=self.run_id,
            device=self._device,
            price=self._price,
            threads=self.job.precision.torch_threads,
            max_ranks=None if num_workers is None else num_workers * gpus_of_each,
            start_timeout_s=cluster.start_timeout_s,
            can_narrow=self.job.parallel.auto,
            load_timeout_s=cluster.load_timeout_s,
            assumed_load_s=cluster.assumed_load_s,
            hang_after_s=cluster.hang_after_s,
            refuse_nodes=partial(refuse_scattered_output, self.job),
            log_level=self.job.log_level,
        )
        return RayPool(factory, plan, self._now_ns)

    def _demands(self) -> dict[ParallelLayout, tuple[dict[str, int], ...]]:
        """What clips take of a GPU, for each layout that one may get."""
        # One item of each form: what a clip takes does not depend on its prompt.
        items = {item.request.form: item for item in self.plan.to_render}.values()
        clips: dict[ParallelLayout, list[tuple[RenderRequest, RecipeConfig]]] = {}
        for item in items:
            for layout in {item.layout, *(offer.layout for offer in item.offers)}:
                clips.setdefault(layout, []).append((item.request, resolved(self.recipes, item.request)))
        size, element_bytes = self.job.model.size, bytes_of_a_number(self.job.precision)
        return {
            layout: demands(each, size, element_bytes=element_bytes, layout=layout) for layout, each in clips.items()
        }

    def _acquire(self) -> Meter:
        seat = WorkerSeat(
            run_id=self.run_id,
            gpu_id=f"{self._device}-0",
            node_id=platform.node(),
            group_id="group-0",
            rank=0,
            acquired_ns=self._now_ns(),
        )
        return Meter(seat, self._price, self._now_ns)

    def _cost_of(self, price_id: str, duration_ns: int) -> Any:
        """Prices a dead run's tail. Its own price if this configuration still has it, else the one in force."""
        prices = {p.price_id: unit_price(p) for p in (self.job.pricing.gpu, self.job.pricing.cpu_worker)}
        price: UnitPrice = prices.get(price_id, self._price)
        return price.cost(duration_ns)

    def _run_facts(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "state": "running",
            "exit_code": None,
            "started_at": timestamp(self._started_ns).isoformat(),
            "finished_at": None,
            "model": self.job.model.name,
            "model_fingerprint": self.fingerprint,
            "recipe": self.job.recipe.name,
            "precision": self.job.precision.name,
            "manifest": self.manifest.uri,
            "manifest_sha256": self.manifest.sha256,
            "output": self.store.root_uri,
            "price_id": self._price.price_id,
            "usd_per_worker_hour": str(self._price.usd_per_hour),
            "config": to_plain(self.job),
            "versions": _versions(),
            # Until the run has ended: what was decided before it started.
            "totals": {
                "rows": self.manifest.num_rows,
                "skipped": len(self.plan.done),
                "rejected": len(self.plan.rejected),
                "to_render": len(self.plan.to_render),
            },
            "workers": [],
        }

    def _finish(self, folder: RunFolder, ending: Ending, x_values: Any) -> int:
        allocation = allocate(ending.charges, ending.rendered_attempts, ending.wasted)
        charge(ending, allocation)
        statuses = count_statuses(self.plan, ending)
        code = exit_code(statuses, ending)
        if folder.fenced:
            _say_why(ending)
            return code
        state = "finished" if code in (0, 3) else "stopped"
        folder.write_results(results_rows(self.plan, ending, self.facts), x_values)
        folder.log("ended", self._now_ns(), exit_code=code, reason=str(ending.stopped_by or ending.limit_reached or ""))
        folder.update(
            {
                "state": "interrupted" if isinstance(ending.stopped_by, Interrupted) else state,
                "exit_code": code,
                "finished_at": self._timestamp(),
                "totals": totals(statuses, ending, allocation, (self._now_ns() - self._started_ns) / NS_PER_S),
            }
        )
        if not isinstance(ending.stopped_by, Interrupted):
            self._index.compact()
        report = rebuild(self._assets.store, self.run_id)
        folder.close()
        say(sys.stdout, f"{report.text}\nreport: {report.page}")
        _say_why(ending)
        return code

    def _timestamp(self) -> str:
        return timestamp(self._now_ns()).isoformat()


def _say_why(ending: Ending) -> None:
    error: PipelineError | None = ending.stopped_by
    if error is not None:
        # What to change about a setting or a file is in the message; where it was noticed helps nobody.
        is_puzzle = not isinstance(error, UsageError)
        if is_puzzle and error.__cause__ is not None and not isinstance(error.__cause__, PipelineError):
            with suppress(OSError):
                traceback.print_exception(error.__cause__)
        say(sys.stderr, f"error: {error}")
    elif ending.limit_reached is not None:
        say(sys.stderr, f"stopped: {ending.limit_reached}; the same command with another limit goes on")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
