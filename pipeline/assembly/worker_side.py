"""The composition root of a worker: configuration to one ready `ClipWorker`. Importing this module loads torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kernels.ops import device_ops
from pipeline.config.jobs import RenderJob
from pipeline.config.recipe import RecipeConfig
from pipeline.cost.meter import Meter
from pipeline.engine.loading import load_engine
from pipeline.media.mux import EncodeSettings
from pipeline.records.outcome import RunFacts
from pipeline.storage.assets import AssetStore
from pipeline.storage.models import local_copy
from pipeline.storage.store import open_store
from pipeline.worker import ClipRecipe, ClipWorker


def build_worker(
    job: RenderJob, recipes: dict[str, RecipeConfig], facts: RunFacts, device: str, meter: Meter
) -> ClipWorker:
    """Load the model and return a worker that is ready for its first item.

    Raises UsageError (CheckpointMismatch) when the model's files are not what the configuration says.
    """
    meter.enter("weight_load")
    store = open_store(job.output)
    model = replace(job.model, folder=str(local_copy(job.model.folder, job.model.name, Path(job.model.cache))))
    engine = load_engine(model, job.precision, device=device, ops=device_ops(device))
    return ClipWorker(
        engine=engine,
        store=AssetStore(store),
        scratch=store.scratch(facts.run_id),
        meter=meter,
        recipes={name: _clip_recipe(recipe) for name, recipe in recipes.items()},
        facts=facts,
        now_ns=meter.now_ns,
    )


def _clip_recipe(recipe: RecipeConfig) -> ClipRecipe:
    encode = recipe.encode
    settings = EncodeSettings(
        preset=encode.preset,
        crf=encode.crf,
        x264_threads=encode.x264_threads,
        audio_bitrate_kbps=encode.audio_bitrate_kbps,
    )
    return ClipRecipe(recipe=recipe, encode=settings, thumbnail_quality=encode.thumbnail_quality)
