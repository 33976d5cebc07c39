"""The slots a denoiser is built with: one frozen value of plain callables, chosen once by whoever builds the model.

What each slot computes, with shapes and dtypes, is defined by the function of the same name in `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels import reference, scaled_mm

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

GateHeadsFn = Callable[[Tensor, Tensor], Tensor]
"""(x_BTD, logits_BTH) -> BTD"""

QuantiseRowsFn = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x_MD -> (float8 MD, scale_M1)"""

Fp8LinearFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(x_BTD, float8 weight_ND, weight_scale_N1, bias_N or None) -> BTN"""

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
    qk_norm_rope_interleaved: QkNormRopeFn
    gate_heads: GateHeadsFn
    gelu_tanh: ActivationFn
    quantise_rows: QuantiseRowsFn
    fp8_linear: Fp8LinearFn


def reference_ops() -> OpSet:
    """The plain torch operations: run anywhere, and define what is right."""
    return OpSet(
        attention=reference.attention,
        rms_norm=reference.rms_norm,
        modulated_rms_norm=reference.modulated_rms_norm,
        modulated_layer_norm=reference.modulated_layer_norm,
        gated_residual=reference.gated_residual,
        qk_norm_rope=reference.qk_norm_rope,
        qk_norm_rope_interleaved=reference.qk_norm_rope_interleaved,
        gate_heads=reference.gate_heads,
        gelu_tanh=reference.gelu_tanh,
        quantise_rows=reference.quantise_rows,
        fp8_linear=reference.fp8_linear,
    )


def device_ops(device: str) -> OpSet:
    """The plain operations, but for those that a device of this kind ("cpu", "cuda", "cuda:1") has units for."""
    if device.split(":")[0] == "cuda":
        return replace(reference_ops(), fp8_linear=scaled_mm.fp8_linear)
    return reference_ops()
