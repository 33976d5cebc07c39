"""A linear layer and its tanh GELU as one product, by the epilogue that cuBLASLt has for both.

    y = gelu_tanh(x W^T + bias)

x (B, T, D), W (N, D), bias (N,) of one dtype. The sum, the bias and the GELU are float32 and y is rounded once, where
the layers one by one round before the GELU too; the tensor between them, four tokens wide, is never written.

Defined by `kernels.reference.linear_gelu`, whose shape suffixes are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear_gelu(x_BTD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """`kernels.reference.linear_gelu` on a GPU. Without a bias, for which torch has no such product, in two steps."""
    if bias_N is None:
        return functional.gelu(functional.linear(x_BTD, weight_ND), approximate="tanh")
    y_MN = torch._addmm_activation(bias_N, x_BTD.flatten(0, -2), weight_ND.t(), use_gelu=True)
    return y_MN.unflatten(0, x_BTD.shape[:-1])
