"""Seconds of the video's self-attention: over all keys, over chosen blocks of them, and of choosing the blocks.

Queries and keys are the structured ones of `structured_heads.py`: on random ones attention is nearly even, and the
error of leaving keys out would say nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.ops import OpSet, fused_ops, reference_ops, with_block_sparse_attention
from pipeline.bench.ceilings import Ceilings, judged
from pipeline.bench.structured_heads import KINDS, MIN_CHANNELS, structured_heads
from pipeline.bench.timing import Call, difference, failure_of, forget, in_turns, kernel_seconds_of, spread
from pipeline.config.model import MIN_DENSITY
from pipeline.engine.latents import video_positions
from pipeline.engine.shortcuts import SparseSettings, SparseStage
from pipeline.geometry import LatentShape
from pipeline.model.sparse_attention import PatternInForce, seen_blocks

DENSITIES = (MIN_DENSITY, 0.3, 0.5, 1.0)
DENSE = "self_attention"
_PLAIN = f"{DENSE}, plain"
_SEED = 0


class _Over(NamedTuple):
    """Attention at one density: the part of all blocks that is seen, what attends, what chooses, and how far off."""

    seen_part: float
    attend: Call
    choose: Call
    difference: dict[str, float]


def measure_attention(
    shape: LatentShape, num_heads: int, head_dim: int, limits: Ceilings, device: str
) -> dict[str, dict[str, Any]]:
    """Facts of dense attention and of each density, by name, of one clip's `num_heads` heads."""
    stages = {f"block_sparse_attention_{density}": _stage(shape, density, device) for density in DENSITIES}
    first, *_ = stages.values()
    q, k = _queries_and_keys(shape, num_heads, head_dim, first, device)
    v = torch.randn_like(q)
    dense = partial(fused_ops(device).attention, q, k, v, None)
    failures: dict[str, dict[str, str]] = {}
    try:
        ops = with_block_sparse_attention(fused_ops(device), device)
        wanted = dense()
        over = {name: _over(ops, q, k, v, stage, wanted) for name, stage in stages.items()}
    except Exception as error:  # noqa: BLE001 - that it cannot take part is a result
        over, failures = {}, dict.fromkeys(stages, failure_of(error))
        forget(device)
    # What torch takes if nobody chooses a library.
    plain = partial(reference_ops().attention, q, k, v, None)
    calls: dict[str, Call] = {_PLAIN: plain, DENSE: dense}
    for name, each in over.items():
        calls |= {name: each.attend, _choosing(name): each.choose}
    times = in_turns(calls, device, kernel_seconds_of)
    flops = 4.0 * q.shape[1] * q.shape[2] ** 2 * q.shape[3]
    found: dict[str, dict[str, Any]] = {
        DENSE: {"plain": spread(times[_PLAIN]), "fused": spread(times[DENSE])}
        | _rates(times[DENSE], flops, 1.0, limits) | {"difference": difference(dense(), plain())}
    }  # fmt: skip
    for name, each in over.items():
        found[name] = (
            {"fused": spread(times[name]), "choice": spread(times[_choosing(name)]), "seen_part": each.seen_part}
            | _rates(times[name], flops, each.seen_part, limits) | {"difference": each.difference}
        )  # fmt: skip
    return found | failures


def _stage(shape: LatentShape, density: float, device: str) -> SparseStage:
    stage = SparseSettings(PatternInForce(), density, 0, 1.0).begin(shape, video_positions(shape, device=device))
    assert stage is not None, "no clip has fewer than 0 tokens"
    return stage


def _queries_and_keys(
    shape: LatentShape, num_heads: int, head_dim: int, stage: SparseStage, device: str
) -> tuple[Tensor, Tensor]:
    """The few structured heads again and again, in the order of blocks. A toy's narrow heads are made wide enough."""
    size = (shape.num_frames, shape.height, shape.width)
    heads = structured_heads(size, channels=max(MIN_CHANNELS, head_dim), seed=_SEED)
    repeats = max(1, num_heads // len(KINDS))
    q, k = (
        x_BHTK.to(device, torch.bfloat16)[:, :, stage.order.source_T].repeat(1, repeats, 1, 1)
        for x_BHTK in (heads.q_BHTK, heads.k_BHTK)
    )
    return q, k


def _over(ops: OpSet, q: Tensor, k: Tensor, v: Tensor, stage: SparseStage, wanted: Tensor) -> _Over:
    seen = seen_blocks(q, k, stage.pattern, ops)
    attend = partial(ops.block_sparse_attention, q, k, v, seen)
    choose = partial(seen_blocks, q, k, stage.pattern, ops)
    return _Over(stage.pattern.seen_part, attend, choose, difference(attend(), wanted))


def _choosing(name: str) -> str:
    return f"{name}, the choice"


def _rates(all_s: list[float], flops: float, seen_part: float, limits: Ceilings) -> dict[str, Any]:
    """Operations a second as if all keys were seen, and as computed, of which no time may be below the floor."""
    median_s = spread(all_s)["median_s"]
    executed = flops * seen_part
    return {"tflops": flops / median_s / 1e12, "executed_tflops": executed / median_s / 1e12} | judged(
        median_s, limits.floor_s(executed, in_float8=False)
    )
