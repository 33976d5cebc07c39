"""Which part of the video's self-attention a precision tier computes, by shape and noise level.

Pure arithmetic that follows the pattern of `pipeline/model/sparse_attention.py`, which takes tensors to make, and the
rules of `pipeline/engine/shortcuts.py` (`tests/engine/test_planned_sparsity.py` holds them equal).
"""

from __future__ import annotations

import math

from pipeline.config.guidance import LEVEL_SLACK
from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.geometry import LatentShape

# As in the pattern: tokens of a block, and blocks that a block sees because they are near it.
BLOCK_TOKENS = 128
NUM_NEAREST = 5
# To choose blocks, each block's mean query meets all keys: 2 D N^2 / 128, where dense attention has 4 D N^2.
CHOICE_PART = 1 / (2 * BLOCK_TOKENS)


def attended_part(precision: PrecisionConfig, size: DenoiserSize, shape: LatentShape, sigma: float) -> float:
    """The part of dense self-attention's operations that a step at noise level `sigma` takes, the mean of all layers.

    1 where nothing is left out; above it where choosing blocks costs and all of them are seen.
    """
    is_sparse = (
        precision.attention == "block_sparse"
        and shape.num_video_tokens >= precision.dense_below_tokens
        and sigma <= precision.dense_above_level + LEVEL_SLACK
    )
    if not is_sparse:
        return 1.0
    num_sparse = max(0, size.num_layers - precision.dense_first_layers - precision.dense_last_layers)
    return mean_of_layers(num_sparse, size.num_layers, seen_part(shape, precision.attention_density))


def mean_of_layers(num_sparse: int, num_layers: int, seen: float) -> float:
    """The mean of all layers where `num_sparse` of them choose and see the part `seen` of all blocks."""
    return 1 + num_sparse / num_layers * (seen + CHOICE_PART - 1)


def seen_part(shape: LatentShape, density: float) -> float:
    """Of all blocks of a clip, those that each block sees: `density` of them, rounded up, and at least twice those that
    it sees in any case, which are the first frame's and the nearest."""
    num_blocks = math.ceil(shape.num_video_tokens / BLOCK_TOKENS)
    num_first = math.ceil(shape.height * shape.width / BLOCK_TOKENS)
    most = min(num_blocks, num_first + NUM_NEAREST)
    return min(num_blocks, max(math.ceil(density * num_blocks), 2 * most)) / num_blocks
