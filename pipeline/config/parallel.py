"""How many devices hold one clip, and which part of the work each of them has."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.cluster import ClusterConfig
from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.config.recipe import RecipeConfig
from pipeline.errors import UsageError
from pipeline.records.parallel import AXES, ParallelLayout

# Of a node that does not say how many GPUs it has.
USUAL_GPUS_PER_NODE = 8


@dataclass
class ParallelConfig:
    """One layout for all clips, by its degrees, or `auto`: for each clip the planner's choice."""

    name: str = "single"
    auto: bool = False
    # Split the video's tokens: by exchanging heads for tokens, by passing keys and values on.
    ulysses: int = 1
    ring: int = 1
    # Splits the weights.
    tensor: int = 1
    # Splits the predictions of a guided step.
    guidance: int = 1

    def __post_init__(self) -> None:
        # Made here so that a bad degree is refused before anything starts.
        if self.layout.num_gpus > 1 and self.auto:
            raise UsageError(
                f"parallel.auto must be false beside degrees, got {self.layout.name}; leave {', '.join(AXES)} out"
            )

    @property
    def layout(self) -> ParallelLayout:
        """The layout of all clips; with `auto`, of those for which nothing speaks against one GPU."""
        return ParallelLayout(ulysses=self.ulysses, ring=self.ring, tensor=self.tensor, guidance=self.guidance)


def require_layout_fits(
    parallel: ParallelConfig,
    size: DenoiserSize,
    recipe: RecipeConfig,
    precision: PrecisionConfig,
    cluster: ClusterConfig,
) -> None:
    """UsageError if the model, the recipe, the tier or the cluster has no room for the degrees of `parallel`."""
    layout = parallel.layout
    layout.require_fits(size.heads, cluster.gpus_per_node or max(USUAL_GPUS_PER_NODE, layout.num_gpus))
    if cluster.pool == "in_process" and layout.num_gpus > 1:
        raise UsageError(
            f"parallel must be single or auto in one process, got {layout.name}; use cluster=local, which starts a "
            "process for each GPU"
        )
    reason = guidance_misfit(layout, recipe, has_audio=size.has_audio) or tier_misfit(layout, precision)
    if reason:
        raise UsageError(reason)


def guidance_misfit(layout: ParallelLayout, recipe: RecipeConfig, *, has_audio: bool) -> str:
    """Why the predictions of the recipe's steps are too few for the layout; empty if they are not."""
    most = 1 if layout.guidance == 1 else recipe.max_passes(has_audio=has_audio)
    if layout.guidance <= most:
        return ""
    allowed = "1" if most == 1 else f"1 to {most}"
    return (
        f"parallel.guidance must be at most the predictions of a step, got {layout.guidance} for recipe {recipe.name}; "
        f"use {allowed}"
    )


def tier_misfit(layout: ParallelLayout, precision: PrecisionConfig) -> str:
    """Why the precision tier cannot be computed in the layout; empty if it can."""
    if layout.ring > 1 and precision.attention == "block_sparse":
        return (
            f"parallel.ring must be 1 with precision.attention=block_sparse, got {layout.ring}: in a ring every key is "
            "attended to; use parallel.ulysses"
        )
    if precision.step_cache_threshold and layout.num_shards * layout.tensor > 1:
        return (
            f"parallel must split guidance only with precision.step_cache_threshold, got {layout.name}: each rank "
            "would decide for itself which steps to compute; use parallel=single, or a threshold of 0"
        )
    return ""
