"""The composition root of a worker, or of a rank of one: configuration to what executes items. Loads torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kernels.ops import OpSet, device_ops, fused_ops, with_block_sparse_attention
from pipeline.accord import alone
from pipeline.assembly.brief import WorkerBrief
from pipeline.config.model import PrecisionConfig
from pipeline.config.recipe import EncodeConfig
from pipeline.cost.meter import Meter
from pipeline.engine.engine import RenderEngine
from pipeline.engine.loading import MemoryBudget, load_engine
from pipeline.errors import UsageError
from pipeline.media.mux import EncodeSettings
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.graphs import GRAPH_BYTES, NUM_KEPT, ON_CUDA, GraphedDenoiser, Recorder
from pipeline.parallel.consent import GangConsent
from pipeline.parallel.guidance import SpreadPasses
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.rows import share_rows
from pipeline.parallel.sequence import SequenceParallelDenoiser
from pipeline.parallel.start import join
from pipeline.parallel.tensor import TensorParallel
from pipeline.records.gang import ALONE, Member
from pipeline.records.parallel import ParallelLayout
from pipeline.rendering import FollowingWorker, Renderer
from pipeline.storage.models import local_copy
from pipeline.storage.store import open_store
from pipeline.worker import ClipFiles, ClipWorker


def build_worker(brief: WorkerBrief, meter: Meter, member: Member = ALONE) -> ClipWorker | FollowingWorker:
    """Load the model, or this rank's part of it, and return what is ready for its first item.

    Raises UsageError (CheckpointMismatch) when the model's files are not what the configuration says.
    """
    meter.enter("weight_load")
    job, device = brief.job, brief.device
    if job.cluster.gpu_memory_limit_gb is not None:
        limit_gpu_memory(job.cluster.gpu_memory_limit_gb, device)
    is_gang = member.num_ranks > 1
    groups = join(member, member.layout, device, job.cluster.load_timeout_s) if is_gang else None
    consent = alone if groups is None else GangConsent()
    engine = _load(brief, member.layout, groups, consent)
    renderer = Renderer(engine, brief.recipes, Path(job.model.cache), consent)
    if not member.is_leader:
        return FollowingWorker(renderer, meter, meter.now_ns)
    store = open_store(job.output, answer_timeout_s=job.storage.answer_timeout_s, is_exclusive=brief.is_exclusive)
    return ClipWorker(
        renderer=renderer,
        store=store,
        patience_s=job.storage.patience_s,
        scratch=store.scratch(brief.facts.run_id),
        meter=meter,
        files={name: clip_files(recipe.encode) for name, recipe in brief.recipes.items()},
        facts=brief.facts,
        now_ns=meter.now_ns,
        take_peak_gpu_bytes=peak_taker(device),
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
            f"precision.attention=block_sparse must find flash-attn-4 on a GPU, got: {error}; install the extra "
            "`flash` (pip install '.[flash]') or use precision.attention=exact"
        ) from error


def _load(
    brief: WorkerBrief, layout: ParallelLayout, groups: RankGroups | None, lowest: Callable[[int], int]
) -> RenderEngine:
    """The engine of one device, or of one of several: tensors are split first, then tokens, then predictions."""
    job, device = brief.job, brief.device
    model = replace(job.model, folder=str(local_copy(job.model.folder, job.model.name, Path(job.model.cache))))
    budget = None
    if device == "cuda":
        # Ranks that keep different parts on the host would wait for the slowest of them at each step.
        budget = MemoryBudget(lowest(_free_gpu_bytes(job.cluster.gpu_memory_limit_gb)), brief.demands[layout])
    ops = operations(job.precision, device)
    sharding = None
    if groups is not None and groups.tensor.group is not None and groups.audio_tensor.group is not None:
        sharding = TensorParallel(groups.tensor.group, groups.audio_tensor.group)
    engine = load_engine(model, job.precision, device=device, ops=ops, budget=budget, sharding=sharding)
    if device == "cuda" and job.model.size.has_audio:
        engine.denoiser.overlap_audio(torch.cuda.Stream())
    if groups is None:
        has_room = device == "cuda" and has_room_for_graphs(job.cluster.gpu_memory_limit_gb, brief.demands[layout])
        return with_graphs(engine, job.cluster.graph_below_tokens) if has_room else engine
    engine.video_decoder.share_rows = partial(share_rows, axis=groups.world)
    assert isinstance(engine.denoiser, AudioVideoDenoiser), "it was just loaded"
    spread = engine.denoiser
    denoiser = SequenceParallelDenoiser(spread, groups, ops.attention_with_lse) if groups.tokens.size > 1 else spread
    spread_passes = SpreadPasses(groups.guidance)
    return replace(engine, denoiser=denoiser, spread=spread_passes, hands_out_frames=groups.is_leader)


def has_room_for_graphs(limit_gb: float | None, demands: Sequence[Mapping[str, int]]) -> bool:
    """If graphs may stay beside the weights, which lie on the GPU by now, and the most that a phase of a clip takes."""
    left_bytes, _ = torch.cuda.mem_get_info()
    if limit_gb is not None:
        left_bytes = min(left_bytes, round(limit_gb * 1e9) - torch.cuda.memory_reserved())
    most_bytes = max((num_bytes for demand in demands for num_bytes in demand.values()), default=0)
    return left_bytes - most_bytes >= NUM_KEPT * GRAPH_BYTES


def with_graphs(engine: RenderEngine, below_tokens: int, recorder: Recorder = ON_CUDA) -> RenderEngine:
    """The engine of one device, its calls of fewer video tokens replayed; as it is if parts of it wait on the host.

    There memory is short, and weights may lie elsewhere at each stage.
    """
    if not below_tokens or engine.residency.waiting:
        return engine
    assert isinstance(engine.denoiser, AudioVideoDenoiser), "it was just loaded"
    sparse = engine.shortcuts.sparse
    in_force = None if sparse is None else sparse.in_force
    graphs = GraphedDenoiser(engine.denoiser, below_tokens, in_force, recorder)
    return replace(engine, denoiser=graphs, graphs=graphs)


def limit_gpu_memory(limit_gb: float, device: str) -> None:
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


def peak_taker(device: str) -> Callable[[], int | None]:
    """What gives the most bytes of device memory in use since its last call; None where there is no device."""
    return _take_peak_gpu_bytes if device == "cuda" else lambda: None


def _take_peak_gpu_bytes() -> int:
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return int(peak)


def clip_files(encode: EncodeConfig) -> ClipFiles:
    """What the files of a recipe's clips are written with."""
    settings = EncodeSettings(
        preset=encode.preset,
        crf=encode.crf,
        x264_threads=encode.x264_threads,
        audio_bitrate_kbps=encode.audio_bitrate_kbps,
    )
    return ClipFiles(encode=settings, thumbnail_quality=encode.thumbnail_quality)
