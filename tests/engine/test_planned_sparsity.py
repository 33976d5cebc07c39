"""What the planner takes the fast tier to compute is what its patterns and rules leave of self-attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.entry import RenderJob, compose_job
from kernels.ops import BLOCK_TOKENS, reference_ops
from pipeline.config.model import DenoiserSize, PrecisionConfig
from pipeline.engine.latents import video_positions
from pipeline.engine.shortcuts import SparseSettings
from pipeline.geometry import LatentShape, PixelShape, latent_shape
from pipeline.model.sparse_attention import NUM_NEAREST, PatternInForce, SparseAttention
from pipeline.planning import sparsity
from pipeline.planning.sparsity import attended_part, mean_of_layers, seen_part
from pipeline.planning.spread import LayerFlops

SIZES = [(544, 960, 121), (1088, 1920, 121), (512, 768, 121), (704, 1216, 121), (1088, 1920, 257), (2176, 3840, 121),
         (736, 1280, 33), (256, 384, 121)]  # fmt: skip
LARGE = latent_shape(PixelShape(121, 1088, 1920, 24.0))


def clip(height: int, width: int, num_frames: int) -> LatentShape:
    return latent_shape(PixelShape(num_frames, height, width, 24.0))


@pytest.mark.parametrize("density", [0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_planned_part_of_blocks_is_the_patterns(size: tuple[int, int, int], density: float) -> None:
    shape = clip(*size)
    stage = SparseSettings(PatternInForce(), density, 0, 1.0).begin(shape, video_positions(shape, device="cpu"))
    assert stage is not None
    assert seen_part(shape, density) == stage.pattern.seen_part
    assert (sparsity.BLOCK_TOKENS, sparsity.NUM_NEAREST) == (BLOCK_TOKENS, NUM_NEAREST)


def test_layers_steps_and_stages_that_the_tier_keeps_dense_are_planned_dense() -> None:
    fast, size = compose_job(RenderJob, "render", ["precision=fast"]).precision, DenoiserSize()
    sparse = mean_of_layers(46, 48, seen_part(LARGE, 0.25))
    assert attended_part(fast, size, LARGE, 0.9) == sparse < 0.5
    assert attended_part(fast, size, LARGE, 0.99) == sparse, "the level itself is sparse"
    assert attended_part(fast, size, LARGE, 0.99375) == 1
    assert attended_part(fast, size, clip(256, 384, 121), 0.9) == 1, "1,536 tokens"
    assert attended_part(fast, DenoiserSize(num_layers=2), LARGE, 0.9) == 1, "no layer is left between the dense ones"
    assert attended_part(PrecisionConfig("fp8", linear="fp8"), size, LARGE, 0.9) == 1


def test_planned_operations_of_sparse_attention_are_those_of_the_slot() -> None:
    shape, (num_heads, channels) = clip(512, 768, 57), (2, 64)
    stage = SparseSettings(PatternInForce(), 0.3, 0, 1.0).begin(shape, video_positions(shape, device="cpu"))
    assert stage is not None
    q, k, v = (torch.randn(1, num_heads, shape.num_video_tokens, channels) for _ in range(3))
    ops = reference_ops()
    slot = SparseAttention(ops.attention, ops, stage.in_force)
    # The counter does not know the fused attention of the CPU; written out, attention is products like any other.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, stage.in_force.during(stage.pattern):
        slot(q, k, v, None)
    size = DenoiserSize(1, num_heads * channels, 0, 0)
    dense, sparse = (
        LayerFlops.of(size, shape, part).attention for part in (1.0, mean_of_layers(1, 1, seen_part(shape, 0.3)))
    )
    assert sparse < 0.8 * dense
    assert counter.get_total_flops() == pytest.approx(sparse, rel=0.001)
