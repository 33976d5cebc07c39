"""What a request takes before it runs: operations counted from its shape, seconds at an assumed rate, dollars.

The count is analytic and checked against an operator-level counter in the tests. The rate is not measured yet, so
every estimate says "uncalibrated".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from pipeline.config.model import DenoiserSize
from pipeline.config.recipe import RecipeConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.geometry import LatentShape, PixelShape, latent_shape
from pipeline.records.request import RenderRequest
from pipeline.records.work import Estimate

UNCALIBRATED = "uncalibrated"
# Tokens of an enhanced prompt: read, the instructions (305 words and signs) and an idea of some 150 words; written, the
# most there can be.
REWRITE_READ_TOKENS, REWRITE_WRITTEN_TOKENS = 512, 512


def denoiser_flops(size: DenoiserSize, shape: LatentShape) -> float:
    """Floating-point operations of one prediction of the denoiser for one clip (a multiply-add counts as 2).

    Per layer, with D and A the video and audio widths, N and M the video and audio tokens, L the text tokens:
    linear layers 28 D^2 N + 4 D^2 L + 28 A^2 M + 4 A^2 L and, between the streams, 8 D A N + 8 A^2 M; attention
    4 D N^2 + 4 D N L + 4 A M^2 + 4 A M L + 8 A N M. A is 0 for a model without sound. Derived from the blocks of
    `pipeline/model`; at the published sizes
    it agrees within 0.2 % with an operator-level counter (`tests/unit/test_estimate.py`).
    """
    d, a, text = size.video_width, size.audio_width, size.text_tokens
    n, m = shape.num_video_tokens, shape.num_audio_latents
    linear = 28 * d * d * n + 4 * d * d * text + 28 * a * a * m + 4 * a * a * text + 8 * d * a * n + 8 * a * a * m
    attention = 4 * d * n * n + 4 * d * n * text + 4 * a * m * m + 4 * a * m * text + 8 * a * n * m
    return float(size.num_layers * (linear + attention))


def clip_flops(request: RenderRequest, recipe: RecipeConfig, size: DenoiserSize) -> float:
    """Operations of a whole clip: the prompt, every prediction of every step of every stage, video decoding.

    A negative prompt is not counted: clips that share it, as most do, encode it once. An enhanced prompt is counted at
    its longest. That bounds its operations, not its seconds: words are written one by one, at the speed of memory.
    """
    return sum(flops for flops, _ in clip_phases(request, recipe, size))


def clip_phases(request: RenderRequest, recipe: RecipeConfig, size: DenoiserSize) -> list[tuple[float, int]]:
    """Operations of each phase of a clip, and in how many steps that a worker tells of (`telemetry.OnStep`)."""
    rendered = request.shape.rendered
    text_tokens = size.text_tokens
    if request.wishes.enhance_prompt:
        text_tokens += REWRITE_READ_TOKENS + REWRITE_WRITTEN_TOKENS
    phases = [(float(size.text_flops_per_token * text_tokens), 1)]
    sizes = recipe.stage_sizes(rendered.height, rendered.width)
    for stage, (height, width) in zip(recipe.stages, sizes, strict=True):
        shape = latent_shape(PixelShape(rendered.num_frames, height, width, rendered.fps))
        samples = stage.num_samples(shape.num_video_tokens, has_audio=size.has_audio)
        num_steps = len(stage.levels(shape.num_video_tokens)) - 1
        phases.append((samples * denoiser_flops(size, shape), max(1, num_steps)))
    height, width = sizes[-1]
    # The first frame comes after up to a third of the work for all.
    phases.append((float(size.decode_flops_per_pixel * rendered.num_frames * height * width), 3))
    return phases


@dataclass(frozen=True)
class Estimator:
    """Operations to seconds and dollars on one worker that computes `assumed_tflops`."""

    size: DenoiserSize
    assumed_tflops: float
    price: UnitPrice

    def estimate(self, request: RenderRequest, recipe: RecipeConfig) -> Estimate:
        phases = clip_phases(request, recipe, self.size)
        flops, longest = sum(flops for flops, _ in phases), max(flops / num_steps for flops, num_steps in phases)
        seconds, longest_s = flops / (self.assumed_tflops * 1e12), longest / (self.assumed_tflops * 1e12)
        return Estimate(flops, seconds, float(self.price.cost(round(seconds * 1e9))), UNCALIBRATED, longest_s)


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
