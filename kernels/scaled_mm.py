"""Float8 matrix products on CUDA's tensor cores, by torch's scaled matrix multiplication.

Defined by the functions of the same name in `kernels.reference`; shape suffixes are those of that module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rows import ScaledRows


def fp8_linear(rows: ScaledRows, weight_ND: Tensor, weight_scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """`kernels.reference.fp8_linear` for bfloat16 on a GPU of compute capability 8.9 or more.

    D and N must be multiples of 16. TypeError if the rows stand for anything but bfloat16, the only output that
    row-wise scales come with.
    """
    if rows.dtype != torch.bfloat16:
        raise TypeError(f"rows must stand for torch.bfloat16 for float8 products on CUDA, got {rows.dtype}")
    y_MN = torch._scaled_mm(
        rows.values_BTD.flatten(0, -2),
        weight_ND.t(),
        scale_a=rows.scale_BT1.flatten(0, -2),
        scale_b=weight_scale_N1.t(),
        bias=bias_N,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y_MN.unflatten(0, rows.values_BTD.shape[:-1])
