"""The slots a model is built with: one frozen value of plain callables, chosen once by whoever builds the model.

What each slot computes, with shapes and dtypes, is defined by the function of the same name in `kernels.reference`, or
for pictures in `kernels.reference_pictures`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels import cudnn_attention, linear_gelu, reference, reference_pictures, scaled_mm
from kernels.rows import Modulation, ScaledRows

log = logging.getLogger(__name__)

BLOCK_TOKENS = reference.BLOCK_TOKENS
_HOPPER = (9, 0)
block_means = reference.block_means

# Shape suffixes are those of kernels.reference.
AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q_BHTK, k_BHSK, v_BHSK, additive bias or None) -> BHTK"""

AttentionWithLseFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""As `AttentionFn` -> BHTK and the log-sum-exp of each query's scores, BHT"""
BlockSparseAttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q_BHTK, k_BHSK, v_BHSK, seen blocks of keys as int32 BHQN) -> BHTK"""

BlockPromiseFn = Callable[[Tensor, Tensor], Tensor]
"""(q_BHTK, k_BHSK) -> float32 BHQN"""

ChosenBlocksFn = Callable[[Tensor, Tensor, int], Tensor]
"""(promise_BHQN, bool always_QN, number seen) -> seen blocks of keys, int32 BHQN, ascending"""

RmsNormFn = Callable[[Tensor, float], Tensor]
"""(x_BTD, eps) -> BTD"""

ModulatedNormFn = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(x_BTD, scale_BND, shift_BND, index_BT or None, eps) -> BTD"""

ModulatedNormQuantisedFn = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], ScaledRows]
"""(x_BTD, scale_BND, shift_BND, index_BT or None, eps) -> rows of BTD"""

GatedResidualFn = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(x_BTD, branch_BTD, gate_BND or None, index_BT or None) -> BTD"""

GatedResidualNormFn = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, Modulation | None, float], tuple[Tensor, Tensor]
]
"""(x_BTD, branch_BTD, gate_BND or None, gate's index_BT or None, modulation or None, eps) -> BTD and its norm, BTD"""

GatedResidualNormQuantisedFn = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, Modulation | None, float], tuple[Tensor, ScaledRows]
]
"""As `GatedResidualNormFn` -> BTD and rows of its norm"""

QkNormRopeFn = Callable[[Tensor, Tensor, "tuple[Tensor, Tensor] | None", int, float], Tensor]
"""(x_BTD, weight_D, (cos_BHTP, sin_BHTP) or None, num_heads, eps) -> BHTK"""

QkNormRopeBothFn = Callable[
    [Tensor, Tensor, Tensor, Tensor, "tuple[Tensor, Tensor]", int, float], tuple[Tensor, Tensor]
]
"""(q_BTD, k_BTD, q_weight_D, k_weight_D, (cos_BHTP, sin_BHTP), num_heads, eps) -> BHTK of each"""

SumOfSquaresFn = Callable[[Tensor], Tensor]
"""x_BTD -> float32 BT1"""

QkScaleRopeFn = Callable[[Tensor, Tensor, Tensor, "tuple[Tensor, Tensor] | None", int], Tensor]
"""(x_BTD, inverse_BT1, weight_D, (cos_BHTP, sin_BHTP) or None, num_heads) -> BHTK"""

GateHeadsFn = Callable[[Tensor, Tensor], Tensor]
"""(x_BTD, logits_BTH) -> BTD"""

QuantiseRowsFn = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x_MD -> (float8 MD, scale_M1)"""

RowPeaksFn = Callable[[Tensor], Tensor]
"""x_MD -> float32 M1"""

QuantiseRowsToFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_MD, peak_M1) -> (float8 MD, scale_M1)"""

GeluQuantisedFn = Callable[[Tensor], ScaledRows]
"""x_BTD -> rows of BTD"""

Fp8LinearFn = Callable[[ScaledRows, Tensor, Tensor, "Tensor | None"], Tensor]
"""(rows of BTD, float8 weight_ND, weight_scale_N1, bias_N or None) -> BTN"""

LinearGeluFn = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x_BTD, weight_ND, bias_N or None) -> BTN"""

ActivationFn = Callable[[Tensor], Tensor]
"""Any shape, element by element."""

FramedFn = Callable[[Sequence[Tensor], tuple[int, int], bool], Tensor]
"""(parts_BCFHW, margin of rows and columns, if it reflects) -> BCFHW with its margin"""

FramedNormSiluFn = Callable[
    [Sequence[Tensor], "Tensor | None", "tuple[Tensor, Tensor] | None", float, tuple[int, int], bool], Tensor
]
"""(parts_BCFHW, bias_C or None, (scale_BC111, shift_BC111) or None, eps, margin, if it reflects) -> as `FramedFn`"""

AddWithBiasFn = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""(x_BCFHW, which is written to; bias_C; parts_BCFHW, perhaps none) -> x_BCFHW"""

RgbToYuv420Fn = Callable[[Tensor], tuple[Tensor, Tensor]]
"""video_CFHW in [-1,1] -> (uint8 I420 planes, (F, 3H/2, W); number of values that are not finite, int32 (1,))"""


@dataclass(frozen=True, kw_only=True)
class OpSet:
    """One implementation of each operation. To swap one, use `dataclasses.replace`.

    `sum_of_squares`, `qk_scale_rope`, `row_peaks` and `quantise_rows_to` are the halves of norms and quantisations
    whose rows are held by several devices.
    """

    attention: AttentionFn
    attention_with_lse: AttentionWithLseFn
    block_sparse_attention: BlockSparseAttentionFn
    block_promise: BlockPromiseFn
    chosen_blocks: ChosenBlocksFn
    rms_norm: RmsNormFn
    modulated_rms_norm: ModulatedNormFn
    modulated_rms_norm_quantised: ModulatedNormQuantisedFn
    modulated_layer_norm: ModulatedNormFn
    gated_residual: GatedResidualFn
    gated_residual_norm: GatedResidualNormFn
    gated_residual_norm_quantised: GatedResidualNormQuantisedFn
    qk_norm_rope: QkNormRopeFn
    qk_norm_rope_interleaved: QkNormRopeFn
    qk_norm_rope_both: QkNormRopeBothFn
    qk_norm_rope_both_interleaved: QkNormRopeBothFn
    sum_of_squares: SumOfSquaresFn
    qk_scale_rope: QkScaleRopeFn
    qk_scale_rope_interleaved: QkScaleRopeFn
    gate_heads: GateHeadsFn
    gelu_tanh: ActivationFn
    gelu_quantised: GeluQuantisedFn
    linear_gelu: LinearGeluFn
    quantise_rows: QuantiseRowsFn
    row_peaks: RowPeaksFn
    quantise_rows_to: QuantiseRowsToFn
    fp8_linear: Fp8LinearFn
    framed: FramedFn
    framed_norm_silu: FramedNormSiluFn
    add_with_bias_: AddWithBiasFn
    rgb_to_yuv420: RgbToYuv420Fn


def reference_ops() -> OpSet:
    """The plain torch operations: run anywhere, and define what is right."""
    plain = {**vars(reference), **vars(reference_pictures)}
    return OpSet(**{field.name: plain[field.name] for field in fields(OpSet)})


def device_ops(device: str) -> OpSet:
    """The plain operations, but for those that a device of this kind ("cpu", "cuda", "cuda:1") has units for."""
    if device.split(":")[0] == "cuda":
        return replace(
            reference_ops(),
            attention_with_lse=cudnn_attention.attention_with_lse,
            fp8_linear=scaled_mm.fp8_linear,
        )
    return reference_ops()


def fused_ops(device: str) -> OpSet:
    """The fastest operations that a device of this kind has: our kernels on "cuda"; on "cpu" those of `device_ops`.

    Kernels run on the current CUDA device, so that must be the one the tensors are on.
    """
    if device.split(":")[0] != "cuda":
        return device_ops(device)
    # Triton comes with torch for CUDA only.
    from kernels import (
        add_with_bias,
        block_promise,
        chosen_blocks,
        framed_norm_silu,
        gated_residual_norm,
        modulated_rms_norm,
        qk_norm_rope,
        quantise_rows,
        rgb_to_yuv420,
    )

    return replace(
        _with_flash_attention(device_ops(device), device),
        block_promise=block_promise.block_promise,
        chosen_blocks=chosen_blocks.chosen_blocks,
        rms_norm=modulated_rms_norm.rms_norm,
        modulated_rms_norm=modulated_rms_norm.modulated_rms_norm,
        modulated_rms_norm_quantised=modulated_rms_norm.modulated_rms_norm_quantised,
        gated_residual=gated_residual_norm.gated_residual,
        gated_residual_norm=gated_residual_norm.gated_residual_norm,
        gated_residual_norm_quantised=gated_residual_norm.gated_residual_norm_quantised,
        qk_norm_rope=qk_norm_rope.qk_norm_rope,
        qk_norm_rope_interleaved=qk_norm_rope.qk_norm_rope_interleaved,
        qk_norm_rope_both=qk_norm_rope.qk_norm_rope_both,
        qk_norm_rope_both_interleaved=qk_norm_rope.qk_norm_rope_both_interleaved,
        sum_of_squares=qk_norm_rope.sum_of_squares,
        qk_scale_rope=qk_norm_rope.qk_scale_rope,
        qk_scale_rope_interleaved=qk_norm_rope.qk_scale_rope_interleaved,
        gelu_quantised=quantise_rows.gelu_quantised,
        linear_gelu=linear_gelu.linear_gelu,
        quantise_rows=quantise_rows.quantise_rows,
        row_peaks=quantise_rows.row_peaks,
        quantise_rows_to=quantise_rows.quantise_rows_to,
        framed=framed_norm_silu.framed,
        framed_norm_silu=framed_norm_silu.framed_norm_silu,
        add_with_bias_=add_with_bias.add_with_bias_,
        rgb_to_yuv420=rgb_to_yuv420.rgb_to_yuv420,
    )


def _with_flash_attention(ops: OpSet, device: str) -> OpSet:
    """`ops` with FlashAttention-4 where that is installed and was measured to be faster than cuDNN: on Hopper."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) != _HOPPER:
        return ops
    try:
        # A library of a gigabyte that nothing else needs.
        from kernels import flash_attention
    except Exception as error:  # noqa: BLE001 - it makes folders and compilers at its import, and cuDNN does without
        facts = {
            "library": "cudnn",
            "because": f"{type(error).__name__}: {error}",
            "way_out": "install the extra `flash` on all nodes alike",
        }
        log.warning("attention is slower than it could be", extra={"facts": facts})
        return ops
    return replace(ops, attention=flash_attention.attention)


def with_block_sparse_attention(ops: OpSet, device: str) -> OpSet:
    """`ops` with the fastest block-sparse attention that a device of this kind has, on "cuda" FlashAttention-4's.

    ImportError without that library, which other operations do without.
    """
    if device.split(":")[0] != "cuda":
        return ops
    # A library of a gigabyte, which only the tier that asks for it must have.
    from kernels import flash_attention

    return replace(ops, block_sparse_attention=flash_attention.block_sparse_attention)
