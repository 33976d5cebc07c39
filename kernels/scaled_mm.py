"""Float8 matrix products on CUDA's tensor cores, by torch's scaled matrix multiplication.

Defined by the functions of the same name in `kernels.reference`; shape suffixes are those of that module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import quantise_rows


def fp8_linear(x_BTD: Tensor, weight_ND: Tensor, weight_scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """`kernels.reference.fp8_linear` for bfloat16 on a GPU of compute capability 8.9 or more.

    D and N must be multiples of 16. TypeError if x is not bfloat16, the only output that row-wise scales come with.
    """
    if x_BTD.dtype != torch.bfloat16:
        raise TypeError(f"x_BTD must be torch.bfloat16 for float8 products on CUDA, got {x_BTD.dtype}")
    quantised_MD, scale_M1 = quantise_rows(x_BTD.flatten(0, -2))
    y_MN = torch._scaled_mm(
        quantised_MD,
        weight_ND.t(),
        scale_a=scale_M1,
        scale_b=weight_scale_N1.t(),
        bias=bias_N,
        out_dtype=torch.bfloat16,
    )
    return y_MN.unflatten(0, x_BTD.shape[:-1])
