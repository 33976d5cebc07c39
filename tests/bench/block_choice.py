"""How much of the softmax mass the choice of blocks keeps on structured queries and keys, by density: a table.

`python -m tests.bench.block_choice [--size 16x34x60] [--channels 128]` runs on a CPU, 1920x1088 in half a minute. What
the heads are like is in `pipeline/bench/structured_heads.py`; the test that holds the shipped density to it is
`tests/engine/test_block_choice.py`.
"""

from __future__ import annotations

import argparse
import sys

import torch

from kernels.ops import reference_ops
from pipeline.bench.structured_heads import kept_mass, sampled_queries, statistics, structured_heads
from pipeline.engine.latents import video_positions
from pipeline.engine.shortcuts import SparseSettings
from pipeline.geometry import LatentShape
from pipeline.model.sparse_attention import PatternInForce, seen_blocks

DENSITIES = (0.25, 0.3, 0.35, 0.4, 0.5, 0.75, 1.0)


def numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:.3f}" for value in values.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="16x17x30", help="frames x rows x columns of latents")
    parser.add_argument("--channels", type=int, default=64, help="of a head")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    frames, rows, columns = (int(count) for count in arguments.size.split("x"))
    shape = LatentShape(frames, rows, columns, num_audio_latents=1, fps=24.0)
    heads = structured_heads((frames, rows, columns), channels=arguments.channels, seed=arguments.seed)
    found, queries_S = statistics(heads), sampled_queries(heads)
    sys.stdout.write(
        f"four heads (near, through time, within a picture, by content) of {shape.num_video_tokens} tokens\n"
        f"keys seen, per cent: {numbers(100 * found.effective_keys_H)}; mass of the top hundredth of keys: "
        f"{numbers(found.top_hundredth_H)}\n"
        "density  blocks   mass kept  by head\n"
    )
    for density in DENSITIES:
        stage = SparseSettings(PatternInForce(), density, 0, 1.0).begin(shape, video_positions(shape, device="cpu"))
        assert stage is not None
        q_BHTK, k_BHTK = (x_BHTK[:, :, stage.order.source_T] for x_BHTK in (heads.q_BHTK, heads.k_BHTK))
        seen_BHQN = seen_blocks(q_BHTK, k_BHTK, stage.pattern, reference_ops().block_promise)
        mass_HS = kept_mass(q_BHTK, k_BHTK, seen_BHQN, queries_S)
        blocks = f"{stage.pattern.num_seen}/{len(stage.pattern.always_QN)}"
        sys.stdout.write(f"{density:<8} {blocks:<8} {mass_HS.mean():.4f}     {numbers(mass_HS.mean(dim=1))}\n")


if __name__ == "__main__":
    main()
