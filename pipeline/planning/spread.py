"""What spreading a clip over GPUs gains and costs: seconds of one prediction of the denoiser on a layout.

Formulas from shapes; each number that is not one says where it is from. Against xDiT's measured steps of LTX-2 19B on
two and four H200 they are within 15 % (`tests/unit/test_spread.py`). Pure arithmetic; knows no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.model import DenoiserSize
from pipeline.geometry import LatentShape
from pipeline.records.parallel import ParallelLayout

# A product of R rows runs at R / (R + HALF_RATE_ROWS) of its best rate: on one H200 4,096 x 16,384 in bf16 made 675
# TFLOP/s with 8,160 rows and 774 with 32,640.
HALF_RATE_ROWS = 1_678
# Norms, rotations and residuals, as a part of a step on one GPU: of 0.486 s and 2.825 s that a compiled step of LTX-2
# took at 8,160 and 32,640 tokens, 0.416 and 2.482 s are products and attention at their measured rates.
ELEMENTWISE_SHARE = 0.12
# One exchange, however short. Assumed, not measured: a kernel's start on each GPU and their signals over NVLink.
EXCHANGE_S = 20e-6
# In one layer, under tensor parallelism: sums of four branches of each stream, and of the squares that its norms of
# queries and keys of six attentions take over all heads.
TENSOR_SUMS = 14
# Channels of a predicted latent: what ranks gather once a prediction.
LATENT_CHANNELS = 128


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one layer for one clip, by how layouts divide them (a multiply-add counts as 2).

    With D and A the video and audio widths, N and M the video and audio tokens, L the text tokens. `linear` grows with
    the video's tokens: 28 D^2 N + 8 D A N. `attention` has video queries or keys: 4 D N^2 + 4 D N L + 8 A N M, of whose
    first term `attended` is computed (`sparsity.py`). `whole` is the sound and the text's keys and values, which every
    rank computes unless weights are split: 36 A^2 M + 4 A^2 L + 4 A M^2 + 4 A M L + 4 D^2 L.
    """

    linear: float
    attention: float
    whole: float

    @classmethod
    def of(cls, size: DenoiserSize, shape: LatentShape, attended: float = 1.0) -> LayerFlops:
        d, a, text = size.video_width, size.audio_width, size.text_tokens
        n, m = shape.num_video_tokens, shape.num_audio_latents
        return cls(
            linear=28 * d * d * n + 8 * d * a * n,
            attention=4 * d * n * n * attended + 4 * d * n * text + 8 * a * n * m,
            whole=36 * a * a * m + 4 * a * a * text + 4 * a * m * m + 4 * a * m * text + 4 * d * d * text,
        )

    @property
    def total(self) -> float:
        return float(self.linear + self.attention + self.whole)


@dataclass(frozen=True)
class Machine:
    """One kind of GPU and the links of its node."""

    tflops: float
    # From one GPU to another, in 1e9 bytes.
    link_gb_per_s: float
    element_bytes: int = 2


def prediction_s(
    size: DenoiserSize, shape: LatentShape, layout: ParallelLayout, machine: Machine, attended: float = 1.0
) -> float:
    """Seconds of one prediction on a group of `layout`. On one GPU: operations at the machine's rate."""
    flops = LayerFlops.of(size, shape, attended)
    alone_s = size.num_layers * flops.total / (machine.tflops * 1e12)
    if layout.num_gpus == 1 or not flops.total:
        return alone_s
    shards, tensor = layout.num_shards, layout.tensor
    rows = max(1, shape.num_video_tokens)
    slower = (1 + HALF_RATE_ROWS * shards / rows) / (1 + HALF_RATE_ROWS / rows)
    part = (flops.linear * slower + flops.attention) / (shards * tensor) + flops.whole / tensor
    computed_s = alone_s * (1 - ELEMENTWISE_SHARE) * part / flops.total
    # Each rank normalises all the tokens it has, whichever part of the weights it has.
    elementwise_s = alone_s * ELEMENTWISE_SHARE / shards
    return computed_s + elementwise_s + _exchanged_s(size, shape, layout, machine)


def _exchanged_s(size: DenoiserSize, shape: LatentShape, layout: ParallelLayout, machine: Machine) -> float:
    """Nothing of it is taken to be hidden behind the computing."""
    tensor, n, m = layout.tensor, shape.num_video_tokens / layout.num_shards, shape.num_audio_latents
    d, a = size.video_width, size.audio_width
    channels, count = 0.0, 0
    if layout.ulysses > 1:
        # Heads for tokens: queries, keys, values and the result; and keys and values that the sound looks at.
        channels += n * (4 * d + 2 * a) / tensor * (layout.ulysses - 1) / layout.ulysses
        count += 6
    if layout.ring > 1:
        # Keys and values of the picture, and those that the sound looks at, go round.
        channels += n * (2 * d + 2 * a) / tensor * (layout.ring - 1)
        count += 2 * (layout.ring - 1)
    if tensor > 1:
        channels += 4 * (n * d + m * a) * 2 * (tensor - 1) / tensor
        count += TENSOR_SUMS
    gathered = shape.num_video_tokens * LATENT_CHANNELS
    num_bytes = (size.num_layers * channels + gathered) * machine.element_bytes
    return num_bytes / (machine.link_gb_per_s * 1e9) + (size.num_layers * count + 1) * EXCHANGE_S
