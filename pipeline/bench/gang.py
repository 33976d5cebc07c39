"""Seconds of one clip's denoiser step, and of its decoding, on several devices of this host, beside one of them.

Each layout is a gang of processes, one a rank, in which all contestants take turns on the same weights; what each
computes and takes on one device is found in the same run. A contestant that fails is reported so. If it took the gang
with it, the others are measured again without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.bench.gang_entrants import KNOWN, default_for, entrants
from pipeline.bench.gang_job import GangJob, Measured
from pipeline.bench.gang_world import GangLost, measured
from pipeline.bench.rows import Row, new_row
from pipeline.config.model import ModelConfig
from pipeline.errors import UsageError
from pipeline.geometry import LatentShape
from pipeline.model.hparams import DenoiserHparams
from pipeline.planning.estimate import denoiser_flops
from pipeline.records.parallel import ParallelLayout

# Of one process a rank, that a machine without GPUs can bear.
_MAX_CPU_RANKS = 8


def gang_jobs(
    config: Mapping[str, Any],
    model: ModelConfig,
    shapes: Mapping[str, LatentShape],
    layouts: Sequence[str],
    contestants: Sequence[str] | None,
    device: str,
) -> list[GangJob]:
    """A job for each layout of these names. `config` is a file's metadata.

    UsageError for a contestant or a layout that does not exist, and for a layout that splits no step, does not divide
    the model's heads or needs more GPUs than this host has.
    """
    unknown = sorted(set(contestants or ()) - set(KNOWN))
    if unknown:
        raise UsageError(f"contestants must be of {', '.join(KNOWN)}, got {', '.join(unknown)}; see --help")
    hparams = DenoiserHparams.from_config(config["transformer"], has_audio=model.size.has_audio)
    heads = [stream.num_heads for stream in (hparams.video, hparams.audio) if stream is not None]
    num_devices = torch.cuda.device_count() if device == "cuda" else _MAX_CPU_RANKS
    jobs = []
    for layout in map(ParallelLayout.named, layouts):
        if layout.num_gpus == 1 or layout.guidance > 1:
            raise UsageError(f"layouts must split one prediction, such as ulysses2, got {layout.name}; see --help")
        layout.require_fits(heads, num_devices)
        names = default_for(layout) if contestants is None else tuple(dict.fromkeys(contestants))
        jobs.append(GangJob(config, model, shapes, names, layout, device, entrants))
    return jobs


def measure_gangs(jobs: Sequence[GangJob]) -> Iterator[Row]:
    """A row for each layout and shape, as soon as it is measured."""
    for job in jobs:
        yield from _measure(job)


def _measure(job: GangJob) -> Iterator[Row]:
    left = dict(job.shapes)
    failures: dict[str, dict[str, Any]] = {}
    while left:
        names = tuple(name for name in job.contestants if name not in failures)
        if not names:
            for label in left:
                yield _row(job, Measured(label, {}, {}), failures)
            return
        try:
            for found in measured(replace(job, shapes=left, contestants=names)):
                left = {label: shape for label, shape in left.items() if label != found.shape}
                yield _row(job, found, failures)
            return
        except GangLost as lost:
            # What was in hand is left out, and if nothing was, nobody is to blame and all are: so this ends.
            lost_with_it = [lost.contestant] if lost.contestant in names else names
            failures |= {str(name): {"failure": str(lost)} for name in lost_with_it}


def _row(job: GangJob, found: Measured, failures: dict[str, dict[str, Any]]) -> Row:
    facts = failures | found.contestants
    shape = job.shapes[found.shape]
    return new_row(
        "gang", model=job.model.name, shape=found.shape, layout=job.layout.name, num_gpus=job.layout.num_gpus,
        num_tokens=shape.num_video_tokens, device=job.device, tflop=denoiser_flops(job.model.size, shape) / 1e12,
        exchanges=found.exchanges, contestants={name: facts[name] for name in job.contestants},
    )  # fmt: skip
