"""Seconds of each operation alone: the plain one and ours, and what share of the copy bandwidth ours reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.ops import BLOCK_TOKENS, fused_ops, reference_ops
from kernels.rows import Modulation, ScaledRows
from pipeline.bench.attention import measure_attention
from pipeline.bench.ceilings import judged, measure_ceilings
from pipeline.bench.rows import Row, new_row
from pipeline.bench.timing import difference, in_turns, kernel_seconds_of, spread
from pipeline.config.model import MIN_DENSITY, ModelConfig
from pipeline.geometry import LatentShape
from pipeline.model.hparams import DenoiserHparams

_EPS = 1e-6


class _Case(NamedTuple):
    """An operation at a size: its slot and arguments, the bytes it cannot do without, operations of its products."""

    slot: str
    arguments: tuple[Any, ...]
    num_bytes: int
    flops: float = 0.0


@torch.inference_mode()
def measure_kernels(
    section: Mapping[str, Any], model: ModelConfig, shapes: Mapping[str, LatentShape], device: str
) -> Iterator[Row]:
    """A row for each shape: operations on as many tokens as its video has. `section` is the `transformer` part."""
    video = DenoiserHparams.from_config(section, has_audio=model.size.has_audio).video
    plain, fused = reference_ops(), fused_ops(device)
    for label, shape in shapes.items():
        limits = measure_ceilings(shape.num_video_tokens, video.num_heads, video.head_dim, device)
        found = measure_attention(shape, video.num_heads, video.head_dim, limits, device)
        for case in _cases(shape.num_video_tokens, video.num_heads, video.head_dim, device):
            calls = {
                name: partial(getattr(ops, case.slot), *case.arguments)
                for name, ops in (("plain", plain), ("fused", fused))
            }
            made = [_tensors(calls[name]()) for name in ("fused", "plain")]
            worst = max((difference(*pair) for pair in zip(*made, strict=True)), key=lambda facts: facts["relative"])
            times = {name: spread(all_s) for name, all_s in in_turns(calls, device, kernel_seconds_of).items()}
            fused_s = times["fused"]["median_s"]
            moved_s = case.num_bytes / limits.copy_tb_per_s / 1e12
            floor_s = max(moved_s, limits.floor_s(case.flops, in_float8=False))
            found[case.slot] = times | {
                "percent_of_copy": 100 * moved_s / fused_s, "percent_of_floor": 100 * floor_s / fused_s,
                "difference": worst, **judged(fused_s, floor_s),
            }  # fmt: skip
        yield new_row(
            "kernel", model=model.name, shape=label, num_tokens=shape.num_video_tokens, device=device,
            ceilings=limits.as_facts(), contestants=found,
        )  # fmt: skip


def _cases(tokens: int, num_heads: int, head_dim: int, device: str) -> Iterator[_Case]:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    width = num_heads * head_dim
    x, branch = draw(1, tokens, width), draw(1, tokens, width)
    shift, scale, gate = draw(1, 1, 3, width).unbind(dim=2)
    modulation, unit = Modulation(scale, shift, None), x.nbytes
    angle = torch.randn(1, num_heads, tokens, head_dim // 2, device=device)
    rotary, weight = (angle.cos(), angle.sin()), draw(width)
    wide = draw(1, tokens, 4 * width)
    up, bias = draw(4 * width, width) / width**0.5, draw(4 * width)
    yield _Case("rms_norm", (x, _EPS), 2 * unit)
    yield _Case("modulated_rms_norm", (x, scale, shift, None, _EPS), 2 * unit)
    yield _Case("modulated_rms_norm_quantised", (x, scale, shift, None, _EPS), unit * 3 // 2)
    yield _Case("gated_residual", (x, branch, gate, None), 3 * unit)
    yield _Case("gated_residual_norm", (x, branch, gate, None, modulation, _EPS), 4 * unit)
    yield _Case("gated_residual_norm_quantised", (x, branch, gate, None, modulation, _EPS), unit * 7 // 2)
    yield _Case("qk_norm_rope", (x, weight, rotary, num_heads, _EPS), 2 * unit + 2 * angle.nbytes)
    yield _Case("qk_norm_rope_interleaved", (x, weight, rotary, num_heads, _EPS), 2 * unit + 2 * angle.nbytes)
    both = (x, branch, weight, draw(width), rotary, num_heads, _EPS)
    for name in ("qk_norm_rope_both", "qk_norm_rope_both_interleaved"):
        yield _Case(name, both, 4 * unit + 2 * angle.nbytes)
    q, k = (each.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for each in (x, branch))
    num_blocks = math.ceil(tokens / BLOCK_TOKENS)
    yield _Case("block_promise", (q, k), 2 * unit, 2.0 * num_blocks * tokens * width)
    promise = torch.randn(1, num_heads, num_blocks, num_blocks, device=device)
    always, num_seen = torch.eye(num_blocks, dtype=torch.bool, device=device), math.ceil(num_blocks * MIN_DENSITY)
    num_chosen_bytes = promise.nbytes + promise[..., :num_seen].numel() * 4
    yield _Case("chosen_blocks", (promise, always, num_seen), num_chosen_bytes)
    yield _Case("quantise_rows", (x,), unit * 3 // 2)
    yield _Case("gelu_quantised", (wide,), 6 * unit)
    yield _Case("linear_gelu", (x, up, bias), 5 * unit + up.nbytes, 2.0 * tokens * width * 4 * width)


def _tensors(output: Any) -> list[Tensor]:
    """All that an operation makes, float8 rows multiplied out."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, ScaledRows):
        return [output.values_BTD.float() * output.scale_BT1]
    first, second = output
    if isinstance(first, Tensor) and first.dtype == torch.float8_e4m3fn:
        return [first.float() * second]
    return [*_tensors(first), *_tensors(second)]
