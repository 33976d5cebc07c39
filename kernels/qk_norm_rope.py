"""Query or key norm over all heads together and the rotary embedding, in one pass.

    y = x / sqrt(mean(x^2 over all D channels) + eps) * weight;   (a, b) -> (a cos - b sin, b cos + a sin)

x (B, T, D = H * K), contiguous, of float32, bfloat16 or float16; weight (D,); cos and sin float32 (B or 1, H, T, K/2),
contiguous, or None for the norm alone. a and b are the two halves of a head's channels, or (interleaved) its even and
odd ones. Everything is float32 and rounded once, to the dtype of x. One program a token holds its row in registers.

Where the channels of a token are held by several devices this comes in two halves: the sum of squares of those here,
then, once the devices have added theirs up, the rest by the inverse of the norm.

Queries and keys of the same tokens are turned alike: done together they read cos and sin, half of what each moves,
once. On one H200 32,640 tokens of 32 heads take 0.37 ms so, and 0.25 ms each alone.

The result has the shape (B, H, T, K) but lies in memory as x does, token by token: rows are written as they were read,
and attention, which gives its result the layout of the queries, needs no copy to put heads side by side again.

Defined by the functions of `kernels.reference` of the same names, whose shape suffixes are used.
"""

# ruff: noqa: ANN001, ANN202  (device code: its arguments are addresses and numbers, typed by the compiler)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import num_warps_for, require_contiguous


@triton.jit
def _load_pairs(row, H: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
                PAIRS: tl.constexpr):  # fmt: skip
    """First and second number of each pair of a row, float32 (HEADS, PAIRS) each."""
    head = tl.arange(0, HEADS)[:, None]
    if INTERLEAVED:
        # Neighbours are loaded together and parted in registers: a thread reads 16 bytes at once, not every other 2.
        channel = tl.arange(0, 2 * PAIRS)[None, :]
        whole = tl.load(row + head * (2 * P) + channel, mask=(head < H) & (channel < 2 * P), other=0.0)
        a, b = tl.split(tl.reshape(whole.to(tl.float32), (HEADS, PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = (head < H) & (pair < P)
        a = tl.load(row + head * (2 * P) + pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(row + head * (2 * P) + P + pair, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(row, a, b, H: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
                 PAIRS: tl.constexpr):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * PAIRS)[None, :]
        whole = tl.reshape(tl.join(a, b), (HEADS, 2 * PAIRS)).to(row.dtype.element_ty)
        tl.store(row + head * (2 * P) + channel, whole, mask=(head < H) & (channel < 2 * P))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = (head < H) & (pair < P)
        tl.store(row + head * (2 * P) + pair, a.to(row.dtype.element_ty), mask=mask)
        tl.store(row + head * (2 * P) + P + pair, b.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _normed_pairs(row, inverse_rms, weight, eps, H: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr,
                  HEADS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """The pairs of a row after the norm; `inverse_rms` points to the inverse of it, or is None."""
    a, b = _load_pairs(row, H, P, INTERLEAVED, HEADS, PAIRS)
    if inverse_rms is not None:
        inverse = tl.load(inverse_rms)
    else:
        inverse = tl.rsqrt(tl.sum(tl.sum(a * a + b * b, axis=1), axis=0) / (2 * H * P) + eps)
    weight_a, weight_b = _load_pairs(weight, H, P, INTERLEAVED, HEADS, PAIRS)
    return a * inverse * weight_a, b * inverse * weight_b


@triton.jit
def _qk_norm_rope_kernel(
    x, inverse_rms, weight, second_x, second_weight, cos, sin, y, second_y, num_tokens, table_sample_stride, eps,
    H: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token_row = tl.program_id(0).to(tl.int64)
    row = token_row * (2 * H * P)
    of_token = None
    if inverse_rms is not None:
        of_token = inverse_rms + token_row
    a, b = _normed_pairs(x + row, of_token, weight, eps, H, P, INTERLEAVED, HEADS, PAIRS)
    if cos is not None:
        head = tl.arange(0, HEADS)[:, None]
        pair = tl.arange(0, PAIRS)[None, :]
        mask = (head < H) & (pair < P)
        of_sample = (token_row // num_tokens) * table_sample_stride
        at = of_sample + (head * num_tokens + token_row % num_tokens) * P + pair
        c = tl.load(cos + at, mask=mask, other=0.0)
        s = tl.load(sin + at, mask=mask, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    _store_pairs(y + row, a, b, H, P, INTERLEAVED, HEADS, PAIRS)
    if second_x is not None:
        a, b = _normed_pairs(second_x + row, None, second_weight, eps, H, P, INTERLEAVED, HEADS, PAIRS)
        a, b = a * c - b * s, b * c + a * s
        _store_pairs(second_y + row, a, b, H, P, INTERLEAVED, HEADS, PAIRS)


@triton.jit
def _sum_of_squares_kernel(x, total, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    values = tl.load(x + row * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    tl.store(total + row, tl.sum(values * values, axis=0))


def qk_norm_rope(
    x_BTD: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int, eps: float
) -> Tensor:
    """`kernels.reference.qk_norm_rope` on a GPU, (B, H, T, K) as a view of (B, T, D). ValueError if a layout is off."""
    (y_BHTK,) = _launch([(x_BTD, weight_D)], eps, rotary, num_heads, interleaved=False)
    return y_BHTK


def qk_norm_rope_interleaved(
    x_BTD: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int, eps: float
) -> Tensor:
    """`kernels.reference.qk_norm_rope_interleaved`, otherwise as `qk_norm_rope`."""
    (y_BHTK,) = _launch([(x_BTD, weight_D)], eps, rotary, num_heads, interleaved=True)
    return y_BHTK


def qk_norm_rope_both(
    q_BTD: Tensor, k_BTD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, rotary: tuple[Tensor, Tensor],
    num_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.reference.qk_norm_rope_both` on a GPU, otherwise as `qk_norm_rope`."""
    q_BHTK, k_BHTK = _launch([(q_BTD, q_weight_D), (k_BTD, k_weight_D)], eps, rotary, num_heads, interleaved=False)
    return q_BHTK, k_BHTK


def qk_norm_rope_both_interleaved(
    q_BTD: Tensor, k_BTD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, rotary: tuple[Tensor, Tensor],
    num_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.reference.qk_norm_rope_both_interleaved` on a GPU, otherwise as `qk_norm_rope`."""
    q_BHTK, k_BHTK = _launch([(q_BTD, q_weight_D), (k_BTD, k_weight_D)], eps, rotary, num_heads, interleaved=True)
    return q_BHTK, k_BHTK


def qk_scale_rope(
    x_BTD: Tensor, inverse_BT1: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int
) -> Tensor:
    """`kernels.reference.qk_scale_rope` on a GPU, otherwise as `qk_norm_rope`."""
    (y_BHTK,) = _launch([(x_BTD, weight_D)], inverse_BT1, rotary, num_heads, interleaved=False)
    return y_BHTK


def qk_scale_rope_interleaved(
    x_BTD: Tensor, inverse_BT1: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int
) -> Tensor:
    """`kernels.reference.qk_scale_rope_interleaved` on a GPU, otherwise as `qk_norm_rope`."""
    (y_BHTK,) = _launch([(x_BTD, weight_D)], inverse_BT1, rotary, num_heads, interleaved=True)
    return y_BHTK


def sum_of_squares(x_BTD: Tensor) -> Tensor:
    """`kernels.reference.sum_of_squares` on a GPU. ValueError if x is not contiguous."""
    require_contiguous("x_BTD", x_BTD)
    width = x_BTD.shape[-1]
    sum_BT1 = torch.empty(*x_BTD.shape[:-1], 1, dtype=torch.float32, device=x_BTD.device)
    block = triton.next_power_of_2(width)
    _sum_of_squares_kernel[(sum_BT1.numel(),)](x_BTD, sum_BT1, D=width, BLOCK=block, num_warps=num_warps_for(block))
    return sum_BT1


def _launch(
    projections: Sequence[tuple[Tensor, Tensor]],
    norm: Tensor | float,
    rotary: tuple[Tensor, Tensor] | None,
    num_heads: int,
    *,
    interleaved: bool,
) -> list[Tensor]:
    """One or two projections of one size, each with its weight, and two with rotations. `norm` is the inverse of each
    token's norm, or the eps with which to find it."""
    for x_BTD, _ in projections:
        require_contiguous("x_BTD", x_BTD)
    (x_BTD, weight_D), *others = projections
    second_x_BTD, second_weight_D = others[0] if others else (None, None)
    if second_x_BTD is not None and second_x_BTD.shape != x_BTD.shape:
        raise ValueError(f"keys must be laid out as queries, {tuple(x_BTD.shape)}, got {tuple(second_x_BTD.shape)}")
    inverse_BT1, eps = (norm, 0.0) if isinstance(norm, Tensor) else (None, norm)
    if inverse_BT1 is not None:
        require_contiguous("inverse_BT1", inverse_BT1)
    num_samples, num_tokens, width = x_BTD.shape
    num_pairs = width // num_heads // 2
    cos, sin = (None, None) if rotary is None else rotary
    sample_stride = 0
    if cos is not None and sin is not None:
        wanted = (num_heads, num_tokens, num_pairs)
        if cos.shape[1:] != wanted or cos.shape[0] not in (1, num_samples) or not cos.is_contiguous():
            raise ValueError(f"cos must be contiguous (1 or {num_samples}, *{wanted}), got {tuple(cos.shape)}")
        if sin.shape != cos.shape or not sin.is_contiguous():
            raise ValueError(f"sin must be laid out as cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
        sample_stride = cos.stride(0) if cos.shape[0] > 1 else 0
    made = [torch.empty_like(each_BTD) for each_BTD, _ in projections]
    heads, pairs = triton.next_power_of_2(num_heads), triton.next_power_of_2(num_pairs)
    _qk_norm_rope_kernel[(num_samples * num_tokens,)](
        x_BTD, inverse_BT1, weight_D, second_x_BTD, second_weight_D, cos, sin, made[0], made[1] if others else None,
        num_tokens, sample_stride, eps, H=num_heads, P=num_pairs, INTERLEAVED=interleaved, HEADS=heads, PAIRS=pairs,
        num_warps=num_warps_for(2 * heads * pairs),
    )  # fmt: skip
    return [y_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y_BTD in made]
