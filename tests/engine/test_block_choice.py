"""The guard of the fast tier: where queries look at something, the shipped choice of blocks keeps what they look at.

`python -m tests.bench.block_choice` prints the same by density.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from jobs.entry import RenderJob, compose_job
from kernels.ops import BLOCK_TOKENS, reference_ops
from pipeline.bench.structured_heads import StructuredHeads, kept_mass, sampled_queries, statistics, structured_heads
from pipeline.config.model import MIN_DENSITY, PrecisionConfig
from pipeline.engine.conditions import HeldPicture, hold_to
from pipeline.engine.latents import Tokens, video_positions
from pipeline.engine.shortcuts import SparseSettings, SparseStage
from pipeline.errors import UsageError
from pipeline.geometry import LatentShape
from pipeline.model.sparse_attention import (
    NUM_NEAREST,
    BlockPattern,
    PatternInForce,
    SparseAttention,
    seen_blocks,
)

OPS = reference_ops()

# Both stages of 1920x1088, 121 frames.
HALF, FULL = (16, 17, 30), (16, 34, 60)
ENOUGH = 0.95
# Of the softmax mass, the most that any one head may lose.
ENOUGH_A_HEAD = 0.94
SEEDS = (0, 1)


def fast() -> PrecisionConfig:
    return compose_job(RenderJob, "render", ["precision=fast"]).precision


def stage_of(size: tuple[int, int, int], density: float) -> SparseStage:
    shape = LatentShape(*size, num_audio_latents=1, fps=24.0)
    stage = SparseSettings(PatternInForce(), density, 0, 1.0).begin(shape, video_positions(shape, device="cpu"))
    assert stage is not None
    return stage


def ordered(heads: StructuredHeads, stage: SparseStage) -> tuple[torch.Tensor, torch.Tensor]:
    return heads.q_BHTK[:, :, stage.order.source_T], heads.k_BHTK[:, :, stage.order.source_T]


def is_enough(mass_H: torch.Tensor) -> bool:
    return bool(mass_H.mean() >= ENOUGH and mass_H.min() >= ENOUGH_A_HEAD)


def shipped_mass(heads: StructuredHeads, stage: SparseStage) -> torch.Tensor:
    """By head."""
    q_BHTK, k_BHTK = ordered(heads, stage)
    seen_BHQN = seen_blocks(q_BHTK, k_BHTK, stage.pattern, OPS)
    return kept_mass(q_BHTK, k_BHTK, seen_BHQN, sampled_queries(heads)).mean(dim=1)


@pytest.fixture(scope="module", params=SEEDS)
def heads(request: pytest.FixtureRequest) -> StructuredHeads:
    return structured_heads(HALF, channels=64, seed=request.param)


@pytest.fixture(scope="module")
def stage() -> SparseStage:
    return stage_of(HALF, fast().attention_density)


def test_made_up_heads_are_as_concentrated_as_they_say(heads):
    found = statistics(heads)
    assert ((found.effective_keys_H > 0.001) & (found.effective_keys_H < 0.006)).all(), found
    assert ((found.top_hundredth_H > 0.90) & (found.top_hundredth_H < 0.97)).all(), found


def test_the_shipped_choice_keeps_what_structured_heads_look_at(heads, stage):
    mass_H = shipped_mass(heads, stage)
    assert is_enough(mass_H), mass_H


def test_the_shipped_density_is_not_below_the_least(stage):
    assert fast().attention_density == MIN_DENSITY == 0.25
    with pytest.raises(UsageError, match=r"attention_density must be between 0\.25 and 1, got 0\.2"):
        PrecisionConfig(attention_density=0.2)
    num_blocks, most = len(stage.pattern.always_QN), int(stage.pattern.always_QN.sum(dim=1).max())
    # Of the first stage a quarter would leave less than half of them to the content.
    assert stage.pattern.num_seen == 2 * most == 18 > math.ceil(fast().attention_density * num_blocks) == 16


def test_raster_order_keeps_less(heads, stage):
    """Same number of blocks, same rule: only what is in a block differs."""
    pattern = BlockPattern(stage.pattern.num_tokens, stage.pattern.num_seen, in_raster_order(stage))
    seen = seen_blocks(heads.q_BHTK, heads.k_BHTK, pattern, OPS)
    mass_H = kept_mass(heads.q_BHTK, heads.k_BHTK, seen, sampled_queries(heads)).mean(dim=1)
    assert not is_enough(mass_H) and mass_H.mean() < shipped_mass(heads, stage).mean() - 0.015, mass_H


def in_raster_order(stage: SparseStage) -> torch.Tensor:
    """A block's own and the first frame's: 510 tokens, the first four blocks."""
    num_blocks = len(stage.pattern.always_QN)
    always_QN = torch.eye(num_blocks, dtype=torch.bool)
    always_QN[:, :4] = True
    return always_QN


def test_random_blocks_keep_far_less(heads, stage):
    q_BHTK, k_BHTK = ordered(heads, stage)
    promise = torch.rand(1, 4, *stage.pattern.always_QN.shape, generator=torch.Generator().manual_seed(0))
    mass_H = mass_by(promise, q_BHTK, k_BHTK, stage, heads)
    assert not is_enough(mass_H) and mass_H.mean() < 0.85, mass_H


def test_pooled_keys_keep_less_because_they_hide_sinks_and_outliers(heads, stage):
    q_BHTK, k_BHTK = ordered(heads, stage)
    blocks = [x.split(BLOCK_TOKENS, dim=2) for x in (q_BHTK, k_BHTK)]
    q_BHQK, k_BHNK = (torch.stack([block.mean(dim=2) for block in each], dim=2) for each in blocks)
    mass_H = mass_by(q_BHQK @ k_BHNK.transpose(2, 3), q_BHTK, k_BHTK, stage, heads)
    assert not is_enough(mass_H) and mass_H.mean() < shipped_mass(heads, stage).mean() - 0.015, mass_H


def test_of_nearly_even_attention_no_more_is_kept_than_is_seen(stage):
    """Why random weights prove nothing: a choice is right or wrong only where queries look at something."""
    generator = torch.Generator().manual_seed(0)
    q_BHTK, k_BHTK = (torch.randn(1, 4, stage.pattern.num_tokens, 64, generator=generator) for _ in range(2))
    mass_H = shipped_mass(StructuredHeads(HALF, q_BHTK, k_BHTK), stage)
    seen = stage.pattern.num_seen / len(stage.pattern.always_QN)
    assert ((mass_H - seen).abs() < 0.02).all(), mass_H


def mass_by(promise, q_BHTK, k_BHTK, stage, heads):
    seen = promise.masked_fill(stage.pattern.always_QN, torch.inf).topk(stage.pattern.num_seen).indices
    return kept_mass(q_BHTK, k_BHTK, seen, sampled_queries(heads)).mean(dim=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_the_shipped_choice_keeps_it_at_1080p(seed):
    mass_H = shipped_mass(structured_heads(FULL, channels=128, seed=seed), stage_of(FULL, fast().attention_density))
    assert is_enough(mass_H), mass_H


def test_promise_is_the_sum_over_the_keys_of_a_block(heads):
    q_BHTK, k_BHTK = heads.q_BHTK[:, :, :300], heads.k_BHTK[:, :, :200]
    promise_BHQN = OPS.block_promise(q_BHTK, k_BHTK)
    assert promise_BHQN.shape == (1, 4, 3, 2)
    mean_BHK = q_BHTK[:, :, 256:300].mean(dim=2)
    expected_BH = (mean_BHK[:, :, None] @ k_BHTK[:, :, 128:200].transpose(2, 3) / 8)[:, :, 0].logsumexp(dim=-1)
    torch.testing.assert_close(promise_BHQN[:, :, 2, 1], expected_BH)


def test_every_block_sees_itself_its_neighbours_and_the_first_frame_and_as_many_as_any(stage):
    pattern = stage.pattern
    num_blocks = math.ceil(8160 / BLOCK_TOKENS)
    assert pattern.always_QN.shape == (num_blocks, num_blocks) and pattern.always_QN.diagonal().all()
    frame = HALF[1] * HALF[2]
    places = (stage.order.source_T < frame).nonzero().flatten()
    assert torch.equal(places, torch.arange(frame)), "the first frame's tiles come first and are its own"
    assert pattern.always_QN[:, : math.ceil(frame / BLOCK_TOKENS)].all()
    count_Q = pattern.always_QN.sum(dim=1)
    assert count_Q.min() >= NUM_NEAREST and 2 * count_Q.max() <= pattern.num_seen
    q_BHTK, k_BHTK = torch.randn(2, 2, 3, 8160, 16)
    seen_BHQN = seen_blocks(q_BHTK, k_BHTK, pattern, OPS)
    assert seen_BHQN.dtype == torch.int32 and seen_BHQN.shape == (2, 3, num_blocks, pattern.num_seen)
    assert (seen_BHQN.diff(dim=-1) > 0).all(), "in ascending order"
    by_block = torch.zeros(2, 3, num_blocks, num_blocks).scatter_add_(3, seen_BHQN.long(), torch.ones(seen_BHQN.shape))
    assert by_block.max() == 1, "none twice"
    assert (by_block[:, :, pattern.always_QN] == 1).all()


def test_full_density_sees_every_block():
    pattern = stage_of((3, 9, 11), 1.0).pattern
    q_BHTK = torch.randn(1, 2, 297, 16)
    seen_BHQN = seen_blocks(q_BHTK, q_BHTK, pattern, OPS)
    assert seen_BHQN.tolist() == [[[[0, 1, 2]] * 3] * 2]


def test_in_a_short_clip_what_is_always_seen_is_half_at_most():
    pattern = stage_of((8, 17, 30), 0.3).pattern
    assert pattern.num_seen == 2 * pattern.always_QN.sum(dim=1).max() == 18
    assert stage_of((2, 2, 2), 0.3).pattern.num_seen == 1


def test_pictures_appended_to_the_clip_are_tokens_like_others():
    shape = LatentShape(9, 17, 30, 1, 24.0)
    tokens = Tokens(torch.zeros(1, shape.num_video_tokens + 510, 4), None)
    hold = hold_to([HeldPicture(torch.zeros(1, 4, 1, 17, 30), 64, 1.0)], tokens, shape)
    stage = SparseSettings(PatternInForce(), 0.3, 0, 1.0).begin(shape, hold.positions_B3T2)
    assert stage.pattern.num_tokens == 5100
    assert sorted(stage.order.source_T[-510:].tolist()) == list(range(4590, 5100))
    # The picture of the last pixel frame is near the last four latent frames, which have tiles of their own.
    whole_blocks_of_later_frames = slice(4, 35)
    nearest = stage.pattern.always_QN[38, whole_blocks_of_later_frames].nonzero().flatten() + 4
    frames = torch.stack([block.float().mean() for block in (stage.order.source_T // 510).split(BLOCK_TOKENS)])
    assert len(nearest) and (frames[nearest] >= 5).all(), frames[nearest]


@pytest.mark.parametrize("why", ["a bias", "another length", "no pattern"])
def test_what_the_pattern_does_not_fit_is_dense(why):
    def refuse(*arguments):
        raise AssertionError("sparse")

    in_force = PatternInForce()
    ops = replace(reference_ops(), block_sparse_attention=refuse, block_promise=refuse)
    attend = SparseAttention(ops.attention, ops, in_force)
    pattern = stage_of((3, 9, 11), 0.3).pattern
    num_tokens = 128 if why == "another length" else 297
    q, bias = torch.randn(1, 2, num_tokens, 16), torch.zeros(1, 1, 1, num_tokens) if why == "a bias" else None
    with in_force.during(None if why == "no pattern" else pattern):
        got = attend(q, q, q, bias)
    torch.testing.assert_close(got, reference_ops().attention(q, q, q, bias))
    assert in_force.pattern is None
