"""Compiles every kernel for Hopper as its launcher would launch it, on a machine that need not have a GPU.

`python -m tests.kernels.compile_for_hopper`, without TRITON_INTERPRET. Prints the kernels' names; what fails raises.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels.ops import fused_ops
from kernels.rows import Modulation

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32",
    torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
# The 19B's: a row of channels, its heads.
WIDTH, NUM_HEADS, EPS = 4096, 32, 1e-6
compiled: list[str] = []


def compiled_for_hopper(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In place of a launch."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
    values |= named
    constants = {name: value for name, value in values.items() if value is None or name in _constexprs(kernel)}
    signature = {name: "constexpr" if name in constants else _type_of(values[name]) for name in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=HOPPER, options=options)
    assert made.asm["cubin"]
    compiled.append(kernel.__name__)


def _constexprs(kernel: JITFunction) -> set[str]:
    return {param.name for param in kernel.params if param.is_constexpr}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def call_all() -> None:
    """Each fused operation that is a kernel of ours, on few tokens of the 19B's width."""
    ops = fused_ops("cuda")

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size).to(dtype)

    x, branch, wide = draw(1, 3, WIDTH), draw(1, 3, WIDTH), draw(1, 3, 4 * WIDTH)
    row = draw(1, 1, WIDTH)
    modulation, index = Modulation(row, row, None), torch.zeros(1, 3, dtype=torch.int64)
    angle = draw(1, NUM_HEADS, 3, WIDTH // NUM_HEADS // 2, dtype=torch.float32)
    rotary, weight, inverse = (angle, angle), draw(WIDTH), torch.ones(1, 3, 1)
    ops.rms_norm(x, EPS)
    for norm in (ops.modulated_rms_norm, ops.modulated_rms_norm_quantised):
        norm(x, row, row, None, EPS)
        norm(x, row, row, index, EPS)
    ops.gated_residual(x, branch, row, None)
    for norm in (ops.gated_residual_norm, ops.gated_residual_norm_quantised):
        norm(x, branch, row, None, modulation, EPS)
        norm(x, branch, None, None, None, EPS)
    for norm in (ops.qk_norm_rope, ops.qk_norm_rope_interleaved):
        norm(x, weight, rotary, NUM_HEADS, EPS)
        norm(x, weight, None, NUM_HEADS, EPS)
    for norm in (ops.qk_norm_rope_both, ops.qk_norm_rope_both_interleaved):
        norm(x, branch, weight, weight, rotary, NUM_HEADS, EPS)
    for scale in (ops.qk_scale_rope, ops.qk_scale_rope_interleaved):
        scale(x, inverse, weight, rotary, NUM_HEADS)
    ops.sum_of_squares(x)
    ops.quantise_rows(x)
    ops.gelu_quantised(wide)
    ops.quantise_rows_to(x, ops.row_peaks(x))
    heads = x.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
    ops.chosen_blocks(ops.block_promise(heads, heads), torch.ones(1, 1, dtype=torch.bool), 1)
    picture = draw(1, 128, 2, 6, 10).contiguous(memory_format=torch.channels_last_3d)
    ops.framed([picture], (1, 1), True)
    ops.framed_norm_silu([picture], draw(128), None, EPS, (1, 1), False)
    ops.add_with_bias_(picture, draw(128), [picture])
    ops.rgb_to_yuv420(draw(3, 2, 6, 10))


if __name__ == "__main__":
    JITFunction.run = compiled_for_hopper
    call_all()
    sys.stdout.write("\n".join(sorted(set(compiled))) + "\n")
