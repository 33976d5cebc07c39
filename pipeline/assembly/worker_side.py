"""The composition root of a worker: configuration to one ready `ClipWorker`. Importing this module loads torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from kernels.ops import OpSet, device_ops, fused_ops, with_block_sparse_attention
from pipeline.assembly.brief import WorkerBrief
from pipeline.config.model import PrecisionConfig
from pipeline.config.recipe import RecipeConfig
from pipeline.cost.meter import Meter
from pipeline.engine.loading import MemoryBudget, load_engine
from pipeline.errors import UsageError
from pipeline.media.mux import EncodeSettings
from pipeline.records.parallel import ONE_GPU
from pipeline.storage.models import local_copy
from pipeline.storage.store import open_store
from pipeline.worker import ClipRecipe, ClipWorker


def build_worker(brief: WorkerBrief, meter: Meter) -> ClipWorker:
    """Load the model and return a worker that is ready for its first item.

    Raises UsageError (CheckpointMismatch) when the model's files are not what the configuration says.
    """
    meter.enter("weight_load")
    job, device = brief.job, brief.device
    if job.cluster.gpu_memory_limit_gb is not None:
        _limit_gpu_memory(job.cluster.gpu_memory_limit_gb, device)
    timeout_s = job.storage.answer_timeout_s
    store = open_store(job.output, answer_timeout_s=timeout_s, is_exclusive=brief.is_exclusive)
    model = replace(job.model, folder=str(local_copy(job.model.folder, job.model.name, Path(job.model.cache))))
    limit_gb = job.cluster.gpu_memory_limit_gb
    budget = MemoryBudget(_free_gpu_bytes(limit_gb), brief.demands[ONE_GPU]) if device == "cuda" else None
    ops = operations(job.precision, device)
    engine = load_engine(model, job.precision, device=device, ops=ops, budget=budget)
    if device == "cuda" and job.model.size.has_audio:
        engine.denoiser.overlap_audio(torch.cuda.Stream())
    return ClipWorker(
        engine=engine,
        store=store,
        patience_s=job.storage.patience_s,
        scratch=store.scratch(brief.facts.run_id),
        cache=Path(job.model.cache),
        meter=meter,
        recipes={name: _clip_recipe(recipe) for name, recipe in brief.recipes.items()},
        facts=brief.facts,
        now_ns=meter.now_ns,
        take_peak_gpu_bytes=_take_peak_gpu_bytes if device == "cuda" else lambda: None,
        resume=job.resume,
        commits=brief.is_exclusive,
    )


def operations(precision: PrecisionConfig, device: str) -> OpSet:
    """What a denoiser of this tier is built with on a device. UsageError where a library for it is missing."""
    ops = (fused_ops if precision.kernels == "fused" else device_ops)(device)
    if precision.attention != "block_sparse":
        return ops
    try:
        return with_block_sparse_attention(ops, device)
    except ImportError as error:
        raise UsageError(
            f"precision.attention=block_sparse must find nvidia-cudnn-frontend and nvidia-cutlass-dsl on a GPU, got: "
            f"{error}; install the extra `sparse` (pip install '.[sparse]') or use precision.attention=exact"
        ) from error


def _limit_gpu_memory(limit_gb: float, device: str) -> None:
    """Let this process allocate `limit_gb` on its GPU at most, as on a smaller one."""
    if device != "cuda":
        raise UsageError(f"cluster.gpu_memory_limit_gb must be left out on {device}, got {limit_gb}; leave it out")
    total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    if limit_gb > total_gb:
        raise UsageError(f"cluster.gpu_memory_limit_gb must be at most {total_gb:.1f}, got {limit_gb}; leave it out")
    torch.cuda.set_per_process_memory_fraction(limit_gb / total_gb)


def _free_gpu_bytes(limit_gb: float | None) -> int:
    free_bytes, _ = torch.cuda.mem_get_info()
    return free_bytes if limit_gb is None else min(free_bytes, round(limit_gb * 1e9))


def _take_peak_gpu_bytes() -> int:
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return int(peak)


def _clip_recipe(recipe: RecipeConfig) -> ClipRecipe:
    encode = recipe.encode
    settings = EncodeSettings(
        preset=encode.preset,
        crf=encode.crf,
        x264_threads=encode.x264_threads,
        audio_bitrate_kbps=encode.audio_bitrate_kbps,
    )
    return ClipRecipe(recipe=recipe, encode=settings, thumbnail_quality=encode.thumbnail_quality)
