"""What a plan would admit, reject, take and cost, as text and JSON. Shared by `jobs.estimate` and dry runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.assembly.driver_side import worker_device, worker_price
from pipeline.config import RenderJob
from pipeline.cost.pricing import unit_price
from pipeline.planning.estimate import quote
from pipeline.planning.plan import Plan
from pipeline.storage.filesystem import write_atomically
from pipeline.storage.manifest import Manifest

NUM_REJECTIONS_SHOWN = 20


def print_quote(job: RenderJob, manifest: Manifest, plan: Plan) -> int:
    """Print the quote, write it to `job.report` if that is set; returns 3 if rows are rejected, else 0."""
    device = worker_device(job)
    price = worker_price(job, device)
    total = quote([(item.request, item.estimate) for item in plan.to_render], unit_price(price))
    tflops = job.cluster.assumed_gpu_tflops if device == "cuda" else job.cluster.assumed_cpu_tflops
    facts: dict[str, Any] = {
        "manifest": manifest.uri,
        "rows": manifest.num_rows,
        "to_render": len(plan.to_render),
        "already_there": len(plan.done),
        "rejected": len(plan.rejected),
        "left_out": len(plan.left_out) + len(plan.left_out_rejected),
        "tflop": total.flops / 1e12,
        "gpu_seconds": total.gpu_seconds,
        "cost_usd": float(total.cost_usd),
        "video_seconds": total.video_seconds,
        "source": total.source,
        "assumed_tflops_per_worker": tflops,
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
            for item in plan.to_render
        ],
    }
    sys.stdout.write(_as_text(facts))
    if job.report is not None:
        write_atomically(Path(job.report).absolute(), json.dumps(facts, indent=1).encode())
    return 3 if plan.rejected else 0


def _as_text(facts: dict[str, Any]) -> str:
    lines = [
        f"manifest {facts['manifest']}: {facts['rows']} rows",
        f"  to render {facts['to_render']}, already there {facts['already_there']}, rejected {facts['rejected']}, "
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
    return "\n".join(lines) + "\n"
