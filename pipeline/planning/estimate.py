"""What a request takes before it runs: operations counted from its shape and tier, seconds at an assumed rate, dollars.

The count is analytic and checked against an operator-level counter in the tests. The rate is not measured yet, so
every estimate says "uncalibrated".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.geometry import LatentShape, PixelShape, latent_shape
from pipeline.planning.sparsity import attended_part
from pipeline.planning.spread import LayerFlops, Machine, prediction_s
from pipeline.records.parallel import MIN_DECODE_ROWS, ONE_GPU, ParallelLayout
from pipeline.records.request import RenderRequest
from pipeline.records.work import Estimate

UNCALIBRATED = "uncalibrated"
# Tokens of an enhanced prompt: read, the instructions (305 words and signs) and an idea of some 150 words; written, the
# most there can be.
REWRITE_READ_TOKENS, REWRITE_WRITTEN_TOKENS = 512, 512


def denoiser_flops(size: DenoiserSize, shape: LatentShape, attended: float = 1.0) -> float:
    """Floating-point operations of one prediction of the denoiser for one clip: those of each layer, see `LayerFlops`.

    `attended` is the part of the video's self-attention that is computed.

    Derived from the blocks of `pipeline/model`; at the published sizes it agrees within 0.2 % with an operator-level
    counter (`tests/unit/test_estimate.py`).
    """
    return size.num_layers * LayerFlops.of(size, shape, attended).total


def clip_flops(request: RenderRequest, recipe: RecipeConfig, size: DenoiserSize, precision: PrecisionConfig) -> float:
    """Operations of a whole clip: the prompt, every prediction of every step of every stage, video decoding.

    A negative prompt is not counted: clips that share it, as most do, encode it once. An enhanced prompt is counted at
    its longest. That bounds its operations, not its seconds: words are written one by one, at the speed of memory.
    """
    return sum(flops for flops, _ in clip_phases(request, recipe, size, precision))


def clip_phases(
    request: RenderRequest, recipe: RecipeConfig, size: DenoiserSize, precision: PrecisionConfig
) -> list[tuple[float, int]]:
    """Operations of each phase of a clip, and in how many steps that a worker tells of (`telemetry.OnStep`)."""
    rendered = request.shape.rendered
    text_tokens = size.text_tokens
    if request.wishes.enhance_prompt:
        text_tokens += REWRITE_READ_TOKENS + REWRITE_WRITTEN_TOKENS
    phases = [(float(size.text_flops_per_token * text_tokens), 1)]
    for stage, shape in _stage_shapes(request, recipe):
        samples = _samples_by_part(stage, shape, size, precision)
        num_steps = len(stage.levels(shape.num_video_tokens)) - 1
        flops = sum(count * denoiser_flops(size, shape, attended) for attended, count in samples.items())
        phases.append((flops, max(1, num_steps)))
    height, width = recipe.stage_sizes(rendered.height, rendered.width)[-1]
    # The first frame comes after up to a third of the work for all.
    phases.append((float(size.decode_flops_per_pixel * rendered.num_frames * height * width), 3))
    return phases


def _stage_shapes(request: RenderRequest, recipe: RecipeConfig) -> list[tuple[StageConfig, LatentShape]]:
    rendered = request.shape.rendered
    sizes = recipe.stage_sizes(rendered.height, rendered.width)
    return [
        (stage, latent_shape(PixelShape(rendered.num_frames, height, width, rendered.fps)))
        for stage, (height, width) in zip(recipe.stages, sizes, strict=True)
    ]


def _samples_by_part(
    stage: StageConfig, shape: LatentShape, size: DenoiserSize, precision: PrecisionConfig, guidance_degree: int = 1
) -> Counter[float]:
    """The samples of `StageConfig.num_samples` by the part of self-attention that is computed for them.

    The level of a step stands for all its evaluations.
    """
    by_level = stage.samples_by_level(shape.num_video_tokens, has_audio=size.has_audio, guidance_degree=guidance_degree)
    samples: Counter[float] = Counter()
    for sigma, count in by_level:
        samples[attended_part(precision, size, shape, sigma)] += count
    return samples


@dataclass(frozen=True)
class Estimator:
    """Operations to seconds and dollars on workers whose GPUs are like `machine`; `price` is for one GPU.

    Operations are those that the tier of `precision` executes. That 8-bit products are faster is not counted, and what
    a step cache will reuse is not known before.
    """

    size: DenoiserSize
    machine: Machine
    price: UnitPrice
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    def estimate(self, request: RenderRequest, recipe: RecipeConfig, layout: ParallelLayout = ONE_GPU) -> Estimate:
        """What a clip takes on a group of `layout`: predictions as `prediction_s` divides them, decoding by rows of the
        picture; the prompt is encoded by the leader while the others are held."""
        phases = clip_phases(request, recipe, self.size, self.precision)
        seconds = [flops / (self.machine.tflops * 1e12) for flops, _ in phases]
        if layout.num_gpus > 1:
            stages = _stage_shapes(request, recipe)
            seconds[1:-1] = [self._sampling_s(stage, shape, layout) for stage, shape in stages]
            _, last = stages[-1]
            seconds[-1] *= _decoded_part(last.height, layout.num_gpus)
        longest_s = max(phase_s / num_steps for phase_s, (_, num_steps) in zip(seconds, phases, strict=True))
        gpu_seconds = layout.num_gpus * sum(seconds)
        return Estimate(
            flops=sum(flops for flops, _ in phases),
            gpu_seconds=gpu_seconds,
            cost_usd=float(self.price.cost(round(gpu_seconds * 1e9))),
            source=UNCALIBRATED,
            longest_step_s=longest_s,
            num_gpus=layout.num_gpus,
        )

    def _sampling_s(self, stage: StageConfig, shape: LatentShape, layout: ParallelLayout) -> float:
        """A stage's predictions, of which guidance parallelism gives a rank its part."""
        samples = _samples_by_part(stage, shape, self.size, self.precision, layout.guidance)
        return sum(
            count * prediction_s(self.size, shape, layout, self.machine, attended)
            for attended, count in samples.items()
        )


def _decoded_part(num_rows: int, num_gpus: int) -> float:
    """Of a latent's rows, those of the rank that has most; what neighbours exchange is not counted."""
    if num_rows // num_gpus < MIN_DECODE_ROWS:
        return 1.0
    return math.ceil(num_rows / num_gpus) / num_rows


@dataclass(frozen=True)
class Quote:
    """The sum of many estimates, for `jobs.estimate` and dry runs."""

    num_clips: int
    flops: float
    gpu_seconds: float
    cost_usd: Decimal
    video_seconds: float
    source: str


def quote(estimates: Sequence[tuple[RenderRequest, Estimate]], price: UnitPrice) -> Quote:
    gpu_seconds = sum(estimate.gpu_seconds for _, estimate in estimates)
    return Quote(
        num_clips=len(estimates),
        flops=sum(estimate.flops for _, estimate in estimates),
        gpu_seconds=gpu_seconds,
        cost_usd=price.cost(round(gpu_seconds * 1e9)),
        video_seconds=sum(request.duration_s for request, _ in estimates),
        source=UNCALIBRATED,
    )
