"""What a precision tier leaves out of a stage's steps: blocks of keys, and layers of steps that are like the last one.

When and where is decided here, from settings; how is in `pipeline/model/sparse_attention.py` and `step_cache.py`.

Shape suffixes: B batch, P predictions of a step, T tokens, C channels, A position axes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.config.guidance import LEVEL_SLACK
from pipeline.engine.step_cache import StepCache
from pipeline.geometry import SPATIAL_CELL_PX, TEMPORAL_CELL_FRAMES, LatentShape
from pipeline.model.denoiser import Denoiser
from pipeline.model.sparse_attention import BlockPattern, PatternInForce, block_pattern
from pipeline.model.streams import Conditioning, Perturbation, TokenStream
from pipeline.model.token_order import TILE, TokenOrder, tile_order

log = logging.getLogger("pipeline.engine")

NUM_KEPT_STAGES = 4
"""Shapes whose order and pattern are kept from clip to clip, the least recently used out first."""


@dataclass(frozen=True, eq=False)
class SparseStage:
    """A stage whose video tokens attend sparsely: their order in all steps, and what holds in the sparse ones."""

    order: TokenOrder
    pattern: BlockPattern
    in_force: PatternInForce
    dense_above_level: float


@dataclass(frozen=True, eq=False)
class SparseSettings:
    """Which stages and steps are sparse, how sparse, and what tells the denoiser's slots so."""

    in_force: PatternInForce
    density: float
    dense_below_tokens: int
    dense_above_level: float
    _begun: dict[LatentShape, SparseStage] = field(default_factory=dict)

    def begin(self, shape: LatentShape, positions_1AT2: Tensor) -> SparseStage | None:
        """For a stage with video tokens at these positions, those of appended pictures last; None if too few.

        Stages of one shape are one object, where the shape says all: what was captured under its pattern serves again.
        """
        num_tokens = positions_1AT2.shape[2]
        if num_tokens < self.dense_below_tokens:
            return None
        if num_tokens > shape.num_video_tokens:
            return self._made(shape, positions_1AT2)
        stage = self._begun.pop(shape, None) or self._made(shape, positions_1AT2)
        self._begun[shape] = stage
        while len(self._begun) > NUM_KEPT_STAGES:
            self._begun.pop(next(iter(self._begun)))
        return stage

    def _made(self, shape: LatentShape, positions_1AT2: Tensor) -> SparseStage:
        num_tokens, device = positions_1AT2.shape[2], positions_1AT2.device
        order = clip_order(shape, num_tokens, device)
        unit_A = torch.tensor((TEMPORAL_CELL_FRAMES / shape.fps, SPATIAL_CELL_PX, SPATIAL_CELL_PX), device=device)
        places_TA = positions_1AT2[0].mean(dim=-1).T / unit_A / torch.tensor(TILE, device=device)
        is_first_T = order.source_T < shape.height * shape.width
        pattern = block_pattern(places_TA[order.source_T], is_first_T, self.density)
        return SparseStage(order, pattern, self.in_force, self.dense_above_level)


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """What an engine's tier may leave out; nothing by default."""

    sparse: SparseSettings | None = None
    # A new memory for each stage.
    step_cache: Callable[[], StepCache] | None = None

    def begin(self, denoiser: Denoiser, shape: LatentShape, positions_1AT2: Tensor) -> StageShortcuts:
        """The denoiser for the steps of one stage; arguments as for `SparseSettings.begin`."""
        sparse = None if self.sparse is None else self.sparse.begin(shape, positions_1AT2)
        return StageShortcuts(denoiser, sparse, None if self.step_cache is None else self.step_cache())


NO_SHORTCUTS = Shortcuts()


class StageShortcuts:
    """The denoiser for the steps of one stage, each as short as the tier allows."""

    def __init__(self, denoiser: Denoiser, sparse: SparseStage | None, cache: StepCache | None) -> None:
        self._denoiser = denoiser
        self._sparse = sparse
        self._cache = cache

    def ordered(self, video: TokenStream) -> TokenStream:
        """The video stream as `prepare` and `velocities` want it."""
        return video if self._sparse is None else self._sparse.order.apply(video)

    def velocities(
        self,
        streams: tuple[TokenStream, TokenStream | None],
        conditioning: Conditioning,
        perturbations: Sequence[Perturbation] | None,
        *,
        sigma: float,
        predictions: Hashable,
    ) -> tuple[Tensor, Tensor | None]:
        """What the denoiser says of streams at noise level `sigma`, (P, T, C) each, video in the clip's own order.

        `predictions` tells calls apart whose samples are conditioned or perturbed otherwise.
        """
        others = None if self._cache is None else self._cache.others_for(predictions)
        sparse = self._sparse
        is_dense = sparse is None or sigma > sparse.dense_above_level + LEVEL_SLACK
        in_force = nullcontext() if sparse is None else sparse.in_force.during(None if is_dense else sparse.pattern)
        with in_force:
            video_PTC, audio_PTC = self._denoiser(*streams, conditioning, perturbations, others)
        assert video_PTC is not None, "a call is always given video"
        return video_PTC if sparse is None else sparse.order.undo(video_PTC), audio_PTC

    def log_reuse(self) -> None:
        """How much of the stage was reused, if any could be."""
        if self._cache is not None:
            facts = {"denoiser_calls": self._cache.num_calls, "calls_reused": self._cache.num_reused}
            log.info("steps reused", extra={"facts": facts})


def clip_order(shape: LatentShape, num_tokens: int, device: torch.device | str) -> TokenOrder:
    """Tiles of the first frame, which is always seen and so shares none with the rest; then of all others; then of
    each picture appended to the clip's own tokens."""
    picture = (1, shape.height, shape.width)
    rest = [(shape.num_frames - 1, shape.height, shape.width)] if shape.num_frames > 1 else []
    num_appended = (num_tokens - shape.num_video_tokens) // (shape.height * shape.width)
    return tile_order([picture, *rest, *[picture] * num_appended], device=device)
