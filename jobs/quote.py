"""What a plan would admit, reject, take and cost, as text and JSON. Shared by `jobs.estimate` and dry runs."""

from __future__ import annotations

import json
import sys
from typing import Any

from pipeline.assembly.driver_side import make_plan, worker_device, worker_price, worker_tflops
from pipeline.config.jobs import RenderJob
from pipeline.config.recipe import Recipes
from pipeline.cost.pricing import unit_price
from pipeline.errors import UsageError
from pipeline.planning.estimate import quote
from pipeline.planning.plan import Plan
from pipeline.storage.filesystem import local_path, write_atomically
from pipeline.storage.manifest import Manifest
from pipeline.storage.models import NOT_STAGED, NotStaged, fingerprint

NUM_REJECTIONS_SHOWN = 20


def quote_job(job: RenderJob, recipes: Recipes) -> int:
    """Print what `job` would do and cost, write it to `job.report` if that is set; returns 3 if rows are rejected."""
    try:
        model_fingerprint = fingerprint(job.model.folder, job.model.name)
    except NotStaged:
        # Without its files nothing can be known to be done; the quote is then for all rows, and says so.
        sys.stdout.write(f"model {job.model.name} is not staged here: every valid row counts as still to render\n")
        model_fingerprint = NOT_STAGED
    manifest, plan = make_plan(job, recipes, model_fingerprint)
    facts = _facts(job, manifest, plan)
    sys.stdout.write(_as_text(facts))
    if job.report is not None:
        path = local_path(job.report)
        if not path.parent.is_dir():
            raise UsageError(f"report must lie in a folder that exists, got {job.report!r}; make {path.parent} first")
        write_atomically(path, json.dumps(facts, indent=1).encode())
    return 3 if plan.rejected else 0


def _facts(job: RenderJob, manifest: Manifest, plan: Plan) -> dict[str, Any]:
    device = worker_device(job)
    price = worker_price(job, device)
    # Rows with equal keys share one video, so they are paid for once.
    clips = list({item.key: item for item in plan.to_render}.values())
    total = quote([(item.request, item.estimate) for item in clips], unit_price(price))
    return {
        "manifest": manifest.uri,
        "rows": manifest.num_rows,
        "to_render": len(clips),
        "sharing_a_video": len(plan.to_render) - len(clips),
        "already_there": len(plan.done),
        "rejected": len(plan.rejected),
        "left_out": len(plan.left_out) + len(plan.left_out_rejected),
        "tflop": total.flops / 1e12,
        "gpu_seconds": total.gpu_seconds,
        "cost_usd": float(total.cost_usd),
        "video_seconds": total.video_seconds,
        "source": total.source,
        "assumed_tflops_per_worker": worker_tflops(job, device),
        "device": device,
        "price_id": price.price_id,
        "price_observed_at": price.observed_at,
        "rejections": [rejection.message for rejection in plan.rejected],
        "clips": [
            {
                "id": item.request.id,
                "gpu_seconds": item.estimate.gpu_seconds,
                "cost_usd": item.estimate.cost_usd,
                "tflop": item.estimate.flops / 1e12,
            }
            for item in clips
        ],
    }


def _as_text(facts: dict[str, Any]) -> str:
    lines = [
        f"manifest {facts['manifest']}: {facts['rows']} rows",
        f"  to render {facts['to_render']} (and {facts['sharing_a_video']} rows that share one of these videos), "
        f"already there {facts['already_there']}, rejected {facts['rejected']}, "
        f"left out {facts['left_out']}",
    ]
    shown = facts["rejections"][:NUM_REJECTIONS_SHOWN]
    lines += [f"  {message}" for message in shown]
    if len(facts["rejections"]) > len(shown):
        lines.append(f"  and {len(facts['rejections']) - len(shown)} more")
    lines += [
        f"  {facts['tflop']:.3f} TFLOP for {facts['video_seconds']:.1f} s of video",
        f"  {facts['gpu_seconds']:.1f} s of one {facts['device']} worker, ${facts['cost_usd']:.6f} "
        f"({facts['price_id']}, seen {facts['price_observed_at']})",
        f"  {facts['source']}: assumes {facts['assumed_tflops_per_worker']:g} TFLOP/s a worker, clips only, without "
        "start-up and idle time",
    ]
    if facts["device"] == "cpu":
        lines.append("  no GPU here, so priced as a CPU worker; cluster.device=cuda prices a GPU")
    return "\n".join(lines) + "\n"
