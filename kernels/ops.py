"""The slots a denoiser is built with: one frozen value of plain callables, chosen once by whoever builds the model.

What each slot computes, with shapes and dtypes, is defined by the function of the same name in `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels import reference

# Shape suffixes are those of kernels.reference.
AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q_BHTK, k_BHSK, v_BHSK, additive bias or None) -> BHTK"""

RmsNormFn = Callable[[Tensor, float], Tensor]
"""(x_BTD, eps) -> BTD"""

ModulatedNormFn = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(x_BTD, scale_BND, shift_BND, index_BT or None, eps) -> BTD"""

GatedResidualFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x_BTD, branch_BTD, gate_BND, index_BT or None) -> BTD"""

QkNormRopeFn = Callable[[Tensor, Tensor, "tuple[Tensor, Tensor] | None", int, float], Tensor]
"""(x_BTD, weight_D, (cos_BHTP, sin_BHTP) or None, num_heads, eps) -> BHTK"""

ActivationFn = Callable[[Tensor], Tensor]
"""Any shape, element by element."""


@dataclass(frozen=True, kw_only=True)
class OpSet:
    """One implementation of each operation. To swap one, use `dataclasses.replace`."""

    attention: AttentionFn
    rms_norm: RmsNormFn
    modulated_rms_norm: ModulatedNormFn
    modulated_layer_norm: ModulatedNormFn
    gated_residual: GatedResidualFn
    qk_norm_rope: QkNormRopeFn
    gelu_tanh: ActivationFn


def reference_ops() -> OpSet:
    """The plain torch operations: run anywhere, and define what is right."""
    return OpSet(
        attention=reference.attention,
        rms_norm=reference.rms_norm,
        modulated_rms_norm=reference.modulated_rms_norm,
        modulated_layer_norm=reference.modulated_layer_norm,
        gated_residual=reference.gated_residual,
        qk_norm_rope=reference.qk_norm_rope,
        gelu_tanh=reference.gelu_tanh,
    )
