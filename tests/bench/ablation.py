"""What each group of kernels gains: seconds of the fused step without it, in turns with the whole step.

`python -m tests.bench.ablation` takes a GPU and appends one row to `tests/bench/results/kernels.jsonl`. Weights, inputs
and timing are those of `tests.bench.kernels`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kernels.ops import OpSet, fused_ops, reference_ops
from kernels.rows import Modulation
from pipeline.model.denoiser import AudioVideoDenoiser
from tests.bench.kernels import RESULTS, Call, bind, copy_of, kept, new_row, seconds_of, variants
from tests.bench.peers import SHAPES, TINY_SHAPES, Shape

# By what the step is timed without: operations that are the plain ones again.
GROUPS = {
    "norms": ("rms_norm", "modulated_rms_norm", "modulated_rms_norm_quantised"),
    "residuals": ("gated_residual", "gated_residual_norm", "gated_residual_norm_quantised"),
    "query and key norms": ("qk_norm_rope",),
    "GELU epilogue": ("linear_gelu",),
    "float8 rows": ("quantise_rows", "gelu_quantised"),
}
SHAPE = "960x544x121"
ROUNDS, STEPS_A_ROUND = 2, 4


def calls_without(whole: AudioVideoDenoiser, shape: Shape, device: str) -> dict[str, Call]:
    """Steps of the same weights, each without one group."""
    blocks = [index for index, block in enumerate(whole.blocks) if block.video.feed_forward.in_float8]
    in_float8 = range(blocks[0], blocks[-1] + 1) if blocks else range(0)
    fused, plain = fused_ops(device), reference_ops()
    others = {
        f"without {name}": replace(fused, **{slot: getattr(plain, slot) for slot in slots})
        for name, slots in GROUPS.items()
    } | {"without sums joined to norms": _apart(fused)}
    calls: dict[str, Call] = {"whole": bind(whole, shape, device)}
    calls |= {name: bind(copy_of(whole, ops, in_float8), shape, device) for name, ops in others.items()}
    return calls | {"without text keys and values kept": bind(whole, shape, device, keep_text=False)}


def _apart(fused: OpSet) -> OpSet:
    """The fused operations, but for a sum and the norm that follows it, which are a kernel each."""

    def summed_then_normed(
        norm: Callable, x: Tensor, branch: Tensor, gate: Tensor | None, index: Tensor | None,
        modulation: Modulation | None, eps: float,
    ) -> tuple:  # fmt: skip
        x = fused.gated_residual(x, branch, gate, index)
        if modulation is None:
            shift = torch.zeros(1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
            return x, norm(x, shift, shift, None, eps)
        return x, norm(x, *modulation, eps)

    return replace(
        fused,
        gated_residual_norm=partial(summed_then_normed, fused.modulated_rms_norm),
        gated_residual_norm_quantised=partial(summed_then_normed, fused.modulated_rms_norm_quantised),
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="show on a machine without a GPU that the script works")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = next(iter(TINY_SHAPES.values())) if arguments.tiny else SHAPES[SHAPE]
    row = new_row(device, arguments.tiny)
    found = row["ablation"] = {}
    with kept(row, arguments.results):
        denoisers = variants(device, arguments.tiny)
        for precision in ("exact", "fp8"):
            calls = calls_without(denoisers[f"{precision} fused"], shape, device)
            times: dict[str, list[float]] = defaultdict(list)
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    call()
                    times[name] += [seconds_of(call, device) for _ in range(STEPS_A_ROUND)]
            for name, all_s in times.items():
                found[f"{precision} {name}"] = {"median_s": statistics.median(all_s), "all_s": all_s}
                sys.stdout.write(f"{precision} {name}: {statistics.median(all_s):.4f} s\n")


if __name__ == "__main__":
    main()
