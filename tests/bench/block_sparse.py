"""Seconds of video self-attention dense and over blocks, of choosing the blocks, and what both cost in fidelity.

`python -m tests.bench.block_sparse` takes a GPU and the extra `sparse`, and appends one row to
`tests/bench/results/kernels.jsonl`. Queries and keys are those of `tests/structured_heads.py`, so that the error of a
density means something. `--tiny` is for a machine without a GPU: it shows that the script works.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from kernels.ops import fused_ops, with_block_sparse_attention
from pipeline.engine.latents import video_positions
from pipeline.engine.shortcuts import SparseSettings
from pipeline.geometry import LatentShape
from pipeline.model.sparse_attention import PatternInForce, seen_blocks
from tests.bench.kernels import RESULTS, difference, kept, median_s, new_row
from tests.structured_heads import KINDS, structured_heads

# Both stages of LTX-2 at 1920x1088, 121 frames; LTX-Video 2B at 1920x1088, 257 frames.
CASES = {"8160x128": ((16, 17, 30), 128), "32640x128": ((16, 34, 60), 128), "67320x64": ((33, 34, 60), 64)}
TINY_CASES = {"672x64": ((7, 8, 12), 64)}
NUM_HEADS = 32
DENSITIES = (0.25, 0.3, 0.5, 1.0)


def times_of(size: tuple[int, int, int], channels: int, device: str) -> dict[str, dict[str, float]]:
    """By density, beside the dense one: milliseconds of attention and of the choice, error against dense attention."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads = structured_heads(size, channels=channels, seed=0)
    repeats = NUM_HEADS // len(KINDS) if device == "cuda" else 1
    shape = LatentShape(*size, num_audio_latents=1, fps=24.0)
    ops = with_block_sparse_attention(fused_ops(device), device)
    settings = [SparseSettings(PatternInForce(), density, 0, 1.0) for density in DENSITIES]
    stages = [each.begin(shape, video_positions(shape, device=device)) for each in settings]
    source_T = stages[0].order.source_T
    q, k = (x.repeat(1, repeats, 1, 1).to(device, dtype)[:, :, source_T] for x in (heads.q_BHTK, heads.k_BHTK))
    v = torch.randn_like(q)
    wanted = ops.attention(q, k, v, None)
    found = {"dense": {"attention_ms": 1e3 * median_s(partial(ops.attention, q, k, v, None), device)}}
    for density, stage in zip(DENSITIES, stages, strict=True):
        seen = seen_blocks(q, k, stage.pattern)
        found[str(density)] = {
            "attention_ms": 1e3 * median_s(partial(ops.block_sparse_attention, q, k, v, seen), device),
            "choice_ms": 1e3 * median_s(partial(seen_blocks, q, k, stage.pattern), device),
            **difference(ops.block_sparse_attention(q, k, v, seen), wanted),
        }
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = new_row(device, arguments.tiny)
    with kept(row, arguments.results):
        row["block_sparse"] = found = {}
        for label, (size, channels) in (TINY_CASES if arguments.tiny else CASES).items():
            found[label] = times_of(size, channels, device)
            for name, facts in found[label].items():
                sys.stdout.write(f"{label} {name}: { {key: float(f'{x:.4g}') for key, x in facts.items()} }\n")


if __name__ == "__main__":
    main()
