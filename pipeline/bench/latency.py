"""Seconds of whole clips in one process that holds its model: from the call to the committed MP4, a tier beside a tier.

Random weights on the device and given embeddings, but the worker that renders for customers: engine, buffer, encoder,
check, commit. Random weights decode to noise, which costs x264 three times what films do. So each tier is timed with
two kinds of pictures: `as_decoded`, and `natural`, where the engine does all its work and the encoder gets frames of
`natural_clip.py` in place of what was decoded. Latents are compared with those of `exact` before anything is timed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline.assembly.worker_side import clip_files, limit_gpu_memory, peak_taker, with_graphs
from pipeline.bench import tiers
from pipeline.bench.ceilings import Ceilings, judged, measure_ceilings
from pipeline.bench.random_parts import draw_parts, engine_of
from pipeline.bench.rows import Row, new_row
from pipeline.bench.tiers import PLAIN, SEED, TIERS, Contestant, Weights
from pipeline.bench.timing import difference, failure_of, forget, num_bytes, spread
from pipeline.bench.watched import WatchedEngine
from pipeline.cluster.assignment import Assignment
from pipeline.config.cluster import ClusterConfig
from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, misfit
from pipeline.cost.meter import Meter, utc_clock
from pipeline.cost.pricing import UnitPrice
from pipeline.engine.engine import Latents, RenderEngine
from pipeline.engine.loading import configure_torch
from pipeline.errors import EngineFault, UsageError
from pipeline.geometry import PixelShape, latent_shape
from pipeline.media.natural_clip import natural_clip
from pipeline.planning.estimate import clip_phases
from pipeline.records.frames import YuvFrames
from pipeline.records.outcome import Failed, Outcome, Rendered, RunFacts, WorkerSeat
from pipeline.records.request import RenderRequest
from pipeline.records.work import Estimate, WorkItem
from pipeline.rendering import Renderer
from pipeline.storage.filesystem import local_path
from pipeline.storage.store import open_store
from pipeline.worker import ClipWorker

KNOWN = {contestant.name: contestant for contestant in TIERS if contestant is not PLAIN}
# The tier that the others' latents are compared with.
EXACT = "exact"
# What each executes, for the count of operations.
_PRECISIONS = {precision.name: precision for precision in (tiers.EXACT, tiers.FP8, tiers.FAST)}
NATURAL, AS_DECODED = "natural", "as_decoded"
# Ten seconds of x264 on noise at 1920x1088, in which a GPU is held and nothing else is learnt.
_REPEATS_AS_DECODED = 1
_STAGES = ("text_encode_s", "denoise_s", "upsample_s", "decode_s", "encode_s", "upload_s")
_UNESTIMATED = Estimate(0.0, 0.0, 0.0, "not estimated")
_FREE = UnitPrice("none", Decimal(0))


@dataclass(frozen=True)
class LatencyPlan:
    """What is timed: clips of `recipe` in each tier, `repeats` of them with natural pictures.

    With `alone` one contestant after the other has the device for itself; else they take turns, beside each other.
    """

    model: ModelConfig
    recipe: RecipeConfig
    contestants: tuple[Contestant, ...]
    repeats: int = 3
    alone: bool = False
    # The process may use so much of its GPU's memory (1e9 bytes), until it ends; no bound if None.
    gpu_memory_limit_gb: float | None = None

    @property
    def repeats_by_pictures(self) -> dict[str, int]:
        return {NATURAL: self.repeats, AS_DECODED: min(self.repeats, _REPEATS_AS_DECODED)}


def chosen(names: Sequence[str] | None) -> tuple[Contestant, ...]:
    """The contestants of these names, all if none are given; `exact` first, which is what the others are compared with.

    UsageError for an unknown one.
    """
    unknown = sorted(set(names or ()) - KNOWN.keys())
    if unknown:
        raise UsageError(f"contestants must be of {', '.join(KNOWN)}, got {', '.join(unknown)}; see --help")
    asked = KNOWN if names is None else dict.fromkeys(names)
    return tuple(KNOWN[name] for name in sorted(asked, key=lambda name: name != EXACT))


def require_possible(recipe: RecipeConfig, model: ModelConfig, shapes: Mapping[str, PixelShape]) -> None:
    """UsageError for a recipe that random weights of the model cannot follow, or not at these sizes."""
    why = misfit(recipe, model)
    adapters = sorted({stage.adapter for stage in recipe.stages if stage.adapter})
    if not why and adapters:
        why = f"it needs adapters, and random weights have none ({', '.join(adapters)})"
    small = [label for label, pixels in shapes.items() if min(pixels.height, pixels.width) < recipe.min_side_px]
    if not why and small:
        why = f"sides must be at least {recipe.min_side_px} pixels, got {', '.join(small)}"
    if why:
        raise UsageError(f"recipe {recipe.name} cannot be measured with {model.name}: {why}; see --help")


@dataclass
class _Entry:
    """A contestant that takes part, and what is known of it so far."""

    name: str
    workers: dict[str, ClipWorker]
    kept: list[Latents]
    # Of the device, for this contestant's weights.
    held_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    # On the host, of the clip that is compared.
    latents: Latents | None = None
    clips: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {NATURAL: [], AS_DECODED: []})


def measure_latency(
    config: Mapping[str, Any], upscaler: Mapping[str, Any], plan: LatencyPlan, shapes: Mapping[str, PixelShape],
    folder: Path, device: str,
) -> Iterator[Row]:  # fmt: skip
    """A row for each shape, as soon as it is measured; the clips lie in `folder` as an output of `jobs.render`.

    `config` and `upscaler` are the metadata of the model's files.
    """
    require_possible(plan.recipe, plan.model, shapes)
    if plan.gpu_memory_limit_gb is not None:
        limit_gpu_memory(plan.gpu_memory_limit_gb, device)
    configure_torch(PrecisionConfig())
    contestants = plan.contestants
    groups = [(each,) for each in contestants] if plan.alone else [contestants]
    for label, pixels in shapes.items():
        stand = _Stand(config, upscaler, plan, pixels, _natural(pixels), folder / label, device)
        facts: dict[str, dict[str, Any]] = {}
        for group in groups:
            facts |= stand.measured(group)
            forget(device)
        # Now that nothing else lies on the device.
        limits = measure_ceilings(latent_shape(pixels).num_video_tokens, *_heads(plan.model), device)
        for contestant in contestants:
            facts[contestant.name] |= _rates(facts[contestant.name], stand.request(""), plan, contestant, limits)
        yield new_row(
            "latency", model=plan.model.name, recipe=plan.recipe.name, shape=label, device=device,
            duration_s=pixels.num_frames / pixels.fps, repeats=plan.repeats_by_pictures, alone=plan.alone,
            gpu_memory_limit_gb=plan.gpu_memory_limit_gb, ceilings=limits.as_facts(),
            contestants={contestant.name: facts[contestant.name] for contestant in contestants},
        )  # fmt: skip


def _heads(model: ModelConfig) -> tuple[int, int]:
    """The number of the video's, and channels of each."""
    return model.size.num_heads, model.size.video_width // model.size.num_heads


def _natural(pixels: PixelShape) -> YuvFrames:
    chunks = natural_clip(pixels.width, pixels.height, pixels.num_frames)
    return YuvFrames(np.concatenate([chunk.planes for chunk in chunks]))


@dataclass
class _Stand:
    """Where contestants are measured with clips of one shape. Between groups it holds nothing on the device."""

    config: Mapping[str, Any]
    upscaler: Mapping[str, Any]
    plan: LatencyPlan
    pixels: PixelShape
    pictures: YuvFrames
    folder: Path
    device: str
    # Of the exact tier, on the host, once it was measured.
    reference: Latents | None = None

    def measured(self, group: Sequence[Contestant]) -> dict[str, dict[str, Any]]:
        """Facts of each of the group: why it failed, or how far off it is and how long its clips took."""
        entries, facts = self._entered(group)
        # What was only needed to build them counts against a bound.
        forget(self.device)
        for entry in entries:
            self._warm_up(entry)
        repeats = self.plan.repeats_by_pictures
        for turn in range(max(repeats.values())):
            for entry in entries:
                for pictures in (pictures for pictures, count in repeats.items() if turn < count):
                    self._take_turn(entry, pictures, turn)
        return facts | {entry.name: entry.facts | self._summary(entry) for entry in entries}

    def _entered(self, group: Sequence[Contestant]) -> tuple[list[_Entry], dict[str, dict[str, Any]]]:
        """Those that can be built, on weights that all share; of the others, why not.

        Once this returns, the 16-bit numbers of layers that every contestant has in 8 bits are gone.
        """
        model, entries, facts = self.plan.model, [], {}
        weights = Weights(self.config["transformer"], model, self.device)
        parts = draw_parts(self.config, self.upscaler, model, self.device)
        for contestant in group:
            try:
                built = contestant.build(weights)
                engine, held_bytes = engine_of(parts, built, self.device), num_bytes(built.module) + parts.held_bytes
                if self.device == "cuda":
                    engine = with_graphs(engine, ClusterConfig().graph_below_tokens)
                entries.append(self._entry(contestant.name, engine, held_bytes))
            except Exception as error:  # noqa: BLE001 - that one cannot take part is a result
                facts[contestant.name] = failure_of(error)
        return entries, facts

    def _entry(self, name: str, engine: RenderEngine, held_bytes: int) -> _Entry:
        kept: list[Latents] = []
        watched = WatchedEngine.of(engine, kept)
        engines = {NATURAL: replace(watched, pictures=self.pictures), AS_DECODED: watched}
        workers = {pictures: self._worker(name, each) for pictures, each in engines.items()}
        return _Entry(name, workers, kept, held_bytes)

    def _worker(self, name: str, engine: RenderEngine) -> ClipWorker:
        """As `worker_side.build_worker` makes it, with a store in a folder."""
        recipe, run_id = self.plan.recipe, "latency"
        store = open_store(str(self.folder))
        store.prepare()
        now_ns = utc_clock()
        meter = Meter(WorkerSeat(run_id, self.device, "here", "here", 0, now_ns()), _FREE, now_ns)
        return ClipWorker(
            renderer=Renderer(engine, {recipe.name: recipe}, self.folder / "cache"),
            store=store,
            patience_s=0.0,
            scratch=store.scratch(run_id),
            meter=meter,
            files={recipe.name: clip_files(recipe.encode)},
            facts=RunFacts(run_id, self.plan.model.name, "random", name),
            now_ns=now_ns,
            take_peak_gpu_bytes=peak_taker(self.device),
        )

    def _warm_up(self, entry: _Entry) -> None:
        """The first clip, untimed, whose latents are compared."""
        try:
            self._rendered(entry, NATURAL, "first", SEED)
        except Exception as error:  # noqa: BLE001 - that one cannot take part is a result
            entry.facts |= failure_of(error)
            return
        entry.latents = _on_host(entry.kept)
        if entry.name == EXACT:
            self.reference = entry.latents
        if self.reference is not None:
            entry.facts["difference"] = _differences(entry.latents, self.reference)

    def _take_turn(self, entry: _Entry, pictures: str, turn: int) -> None:
        """A timed clip. The first one as decoded has the noise of the clip that was compared, and must give the same
        latents; every other has noise of its own."""
        if "failure" in entry.facts:
            return
        is_same_again = pictures == AS_DECODED and turn == 0
        seed = SEED if is_same_again else SEED + 1 + turn
        try:
            entry.clips[pictures].append(self._rendered(entry, pictures, str(turn), seed))
        except Exception as error:  # noqa: BLE001 - that it fails is a result
            entry.facts |= failure_of(error)
            return
        if is_same_again and entry.latents is not None:
            again = _differences(_on_host(entry.kept), entry.latents)
            entry.facts["again"] = again
            # A comparison with NaN is false.
            if entry.name == EXACT and not all(of["relative"] == 0 for of in again.values()):
                entry.facts["error"] = f"latents of {EXACT} must be finite and the same at each call, got {again}"

    def _rendered(self, entry: _Entry, pictures: str, turn: str, seed: int) -> dict[str, Any]:
        """A clip and what it took. EngineFault if there is none."""
        request = replace(self.request(f"{entry.name}-{pictures}-{turn}"), seed=seed)
        item = WorkItem(request, hashlib.sha256(request.id.encode()).hexdigest(), _UNESTIMATED)
        resting_bytes = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        answers: SimpleQueue[Outcome | None] = SimpleQueue()
        began_s, began_at_s = time.perf_counter(), time.time()
        entry.workers[pictures].execute(Assignment(item, answers.put))
        outcome = answers.get()
        wall_s = time.perf_counter() - began_s
        if not isinstance(outcome, Rendered):
            assert isinstance(outcome, Failed), "a worker that leads answers"
            raise EngineFault(f"{outcome.error_class}: {outcome.error_message}")
        # The file is linked to its final name, not written again.
        closed_s = local_path(outcome.asset.uri).stat().st_mtime - began_at_s
        return _clip_facts(outcome, wall_s, closed_s, beside_bytes=resting_bytes - entry.held_bytes)

    def request(self, clip_id: str) -> RenderRequest:
        """A clip of the stand's shape."""
        pixels, recipe = self.pixels, self.plan.recipe
        return RenderRequest(
            id=clip_id, row_index=0, prompt="embeddings are given", seed=SEED, width=pixels.width, height=pixels.height,
            num_frames=pixels.num_frames, fps=pixels.fps, recipe=recipe.name, grid_px=recipe.grid_px,
        )  # fmt: skip

    def _summary(self, entry: _Entry) -> dict[str, Any]:
        """Of each kind of pictures: seconds from the call to the outcome, medians of the stages, memory, all clips."""
        if "failure" in entry.facts:
            return {}
        pictures = {kind: _of_clips(clips, self.request("")) for kind, clips in entry.clips.items()}
        return {"held_bytes": entry.held_bytes, "pictures": pictures}


def _clip_facts(rendered: Rendered, wall_s: float, closed_s: float, *, beside_bytes: int) -> dict[str, Any]:
    """`closed_s` until the MP4 is closed, `wall_s` until it is also read back and committed. `beside_bytes` of the
    device lay there all the time, and are not this contestant's.
    """
    peak_bytes = rendered.peak_gpu_memory_bytes
    return {
        "seed": rendered.item.request.seed,
        "wall_s": wall_s,
        "closed_s": closed_s,
        **{stage: getattr(rendered.timings, stage) for stage in _STAGES},
        "size_bytes": rendered.asset.size_bytes,
        "peak_gpu_memory_bytes": None if peak_bytes is None else peak_bytes - beside_bytes,
        "peak_gpu_memory_bytes_of_all": peak_bytes,
    }


def _of_clips(clips: Sequence[Mapping[str, Any]], request: RenderRequest) -> dict[str, Any]:
    seconds = spread([clip["wall_s"] for clip in clips])
    peaks = [clip["peak_gpu_memory_bytes"] for clip in clips if clip["peak_gpu_memory_bytes"] is not None]
    return {
        **seconds,
        "closed_s": median([clip["closed_s"] for clip in clips]),
        **{stage: median([clip[stage] for clip in clips]) for stage in _STAGES},
        "real_time_factor": request.duration_s / seconds["median_s"],
        "size_bytes": median([clip["size_bytes"] for clip in clips]),
        "peak_gpu_memory_bytes": max(peaks, default=None),
        "clips": list(clips),
    }


def _rates(
    facts: Mapping[str, Any], request: RenderRequest, plan: LatencyPlan, contestant: Contestant, limits: Ceilings
) -> dict[str, Any]:
    """Seconds of denoising in all clips, and what part of them is the floor: the executed operations at the best
    measured rate."""
    if "pictures" not in facts:
        return {}
    _, *stages, _ = clip_phases(request, plan.recipe, plan.model.size, _PRECISIONS[contestant.name])
    flops = sum(flops for flops, _ in stages)
    all_s = [clip["denoise_s"] for of in facts["pictures"].values() for clip in of["clips"]]
    floor_s = limits.floor_s(flops, in_float8=contestant.in_float8)
    return {
        "denoise_s": spread(all_s), "denoise_executed_tflop": flops / 1e12, "denoise_floor_s": floor_s,
        "floor_percent": 100 * floor_s / median(all_s), **judged(median(all_s), floor_s),
        # What is wrong with the latents is said first.
        **{name: facts[name] for name in ("error",) if name in facts},
    }  # fmt: skip


def _on_host(kept: Sequence[Latents]) -> Latents:
    (latents,) = kept
    audio_BCTM = latents.audio_BCTM
    return Latents(latents.video_BCFHW.cpu(), None if audio_BCTM is None else audio_BCTM.cpu())


def _differences(got: Latents, wanted: Latents) -> dict[str, dict[str, float]]:
    found = {"video": difference(got.video_BCFHW, wanted.video_BCFHW)}
    if got.audio_BCTM is not None and wanted.audio_BCTM is not None:
        found["audio"] = difference(got.audio_BCTM, wanted.audio_BCTM)
    return found
