"""What a driver tells the workers it starts. Travels between processes and loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.jobs import RenderJob
from pipeline.config.recipe import RecipeConfig
from pipeline.records.outcome import RunFacts
from pipeline.records.parallel import ParallelLayout


@dataclass(frozen=True)
class WorkerBrief:
    """All that a worker is built from, but for its meter."""

    job: RenderJob
    recipes: Mapping[str, RecipeConfig]
    facts: RunFacts
    device: str
    # Bytes of a GPU that each phase needs beside weights: for each layout that clips may get, for each kind of clip, the
    # largest first.
    demands: Mapping[ParallelLayout, tuple[Mapping[str, int], ...]]
    # If the output's store can tell two writers of one name apart, as the driver found; else the driver alone commits.
    is_exclusive: bool = True
