"""What clips take of a device's memory beside weights, before anything is loaded. Pure arithmetic from shapes.

Which parts of the model then wait on the host is decided by the worker, who knows the files (`engine/memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.config.recipe import RecipeConfig
from pipeline.geometry import PixelShape, latent_shape
from pipeline.records.parallel import ONE_GPU, ParallelLayout
from pipeline.records.request import RenderRequest

# Activations in 16-bit numbers, from measurements on one H200 (torch 2.11, 121 frames): the LTX-2 denoiser's peak at
# 32,640 tokens is 1.95 GB above its weights. The video is decoded eight frames at a time, so only a frame's pixels
# count: with its 1.0 GB of weights the decoder takes 6.19 GB at 1920x1088 (stream_8_channels_last_fused of jobs.bench
# decode, when windows still held what is normed beside what is not), and so about 2.0 GB at 768x512. More is planned.
DENOISE_BYTES_PER_TOKEN_AND_CHANNEL = 15
# Of these, what a rank has of all channels however the weights are split: the tokens, and the same normalised.
WHOLE_BYTES_PER_TOKEN_AND_CHANNEL = 4
DECODE_BYTES_PER_PIXEL_OF_A_FRAME = 3_000
DECODE_BYTES_AT_LEAST = 1.4e9
# The upsampler takes the whole clip: an eighth of the decoder's sides, and less work at each place.
UPSAMPLE_BYTES_PER_PIXEL = 109 / 64
# Hidden states of every layer of a 12 B encoder over 1,024 tokens, twice (stacked): under a gigabyte.
TEXT_BYTES = 1.0e9


def demands(
    clips: Iterable[tuple[RenderRequest, RecipeConfig]],
    size: DenoiserSize,
    *,
    element_bytes: int,
    layout: ParallelLayout = ONE_GPU,
) -> tuple[dict[str, int], ...]:
    """Bytes that each phase takes of a GPU, for each kind of clip, the largest first; `element_bytes` of a number is 2
    or 4.

    One that no device holds must not decide for the others, so they are not summed up here.
    """
    kinds = {tuple(_demand(request, recipe, size, element_bytes, layout).items()) for request, recipe in clips}
    return tuple(dict(kind) for kind in sorted(kinds, key=lambda kind: max(n for _, n in kind), reverse=True))


def denoiser_bytes(size: DenoiserSize, precision: PrecisionConfig) -> float:
    """Weights of the blocks: in each layer 16 D^2 + 20 A^2 + 4 D A numbers, with D and A the video and audio widths.

    That is 98 % of the published 18.88 B of LTX-2 19B; fp8 takes one byte a number in the blocks that it is for.
    """
    d, a = size.video_width, size.audio_width
    element_bytes = bytes_of_a_number(precision)
    num_fp8 = 0
    if precision.linear == "fp8":
        num_fp8 = max(0, size.num_layers - precision.keep_first_blocks - precision.keep_last_blocks)
    return (16 * d * d + 20 * a * a + 4 * d * a) * float(num_fp8 + (size.num_layers - num_fp8) * element_bytes)


def bytes_of_a_number(precision: PrecisionConfig) -> int:
    return 4 if precision.dtype == "float32" else 2


def bytes_on_a_gpu(
    request: RenderRequest,
    recipe: RecipeConfig,
    size: DenoiserSize,
    precision: PrecisionConfig,
    layout: ParallelLayout = ONE_GPU,
) -> float:
    """What the fullest GPU of a group must hold at once, were everything else on the host: the denoiser at work, or the
    upsampler or the decoder, which the leader has for itself."""
    demand = _demand(request, recipe, size, bytes_of_a_number(precision), layout)
    at_work = denoiser_bytes(size, precision) / layout.tensor + demand["denoise"]
    return max(at_work, demand["upsample"], demand["decode"])


def _demand(
    request: RenderRequest,
    recipe: RecipeConfig,
    size: DenoiserSize,
    element_bytes: int,
    layout: ParallelLayout = ONE_GPU,
) -> dict[str, int]:
    rendered, scale = request.shape.rendered, element_bytes / 2
    sizes = recipe.stage_sizes(rendered.height, rendered.width)
    tokens, max_samples = 0, 0
    for stage, (height, width) in zip(recipe.stages, sizes, strict=True):
        shape = latent_shape(PixelShape(rendered.num_frames, height, width, rendered.fps))
        samples = math.ceil(stage.samples_of_a_call(has_audio=size.has_audio) / layout.guidance)
        max_samples = max(max_samples, samples)
        video_tokens = math.ceil(shape.num_video_tokens / layout.num_shards)
        tokens = max(tokens, samples * (video_tokens + shape.num_audio_latents))
    pixels = sizes[-1][0] * sizes[-1][1]
    # Keys and values of the text in every layer, kept for all steps.
    width = size.video_width + size.audio_width
    text_bytes = max_samples * size.num_layers * 2 * size.text_tokens * width * element_bytes // layout.tensor
    whole = WHOLE_BYTES_PER_TOKEN_AND_CHANNEL
    per_channel = whole + (DENOISE_BYTES_PER_TOKEN_AND_CHANNEL - whole) / layout.tensor
    return {
        "text_encode": round(TEXT_BYTES * scale),
        "denoise": round(per_channel * tokens * size.video_width * scale) + text_bytes,
        "upsample": round(UPSAMPLE_BYTES_PER_PIXEL * rendered.num_frames * pixels * scale),
        "decode": round((DECODE_BYTES_AT_LEAST + DECODE_BYTES_PER_PIXEL_OF_A_FRAME * pixels) * scale),
    }
