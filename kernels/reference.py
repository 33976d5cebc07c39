"""Every operation of the denoiser in plain torch: the definition that a faster version must match.

Inputs may be float32, bfloat16 or float16. Except for attention, arithmetic is float32 throughout and rounded once, to
the dtype of the first argument. No operation writes to its inputs.

Shape suffixes: B batch, T tokens, S keys, D channels of a token, H heads, K channels of a head, P = K/2,
N distinct timesteps of a sample. A size of 1 at B broadcasts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, (B, H, T, K), in the dtype of q.

    `bias` broadcasts to (B, H, T, S), has the dtype of q and is finite, so a row of nothing but hidden keys is an even
    mean and never NaN.
    """
    return functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias)


def rms_norm(x_BTD: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2 over D) + eps), (B, T, D)."""
    return _rms_normalised(x_BTD, eps).to(x_BTD.dtype)


def modulated_rms_norm(
    x_BTD: Tensor, scale_BND: Tensor, shift_BND: Tensor, index_BT: Tensor | None, eps: float
) -> Tensor:
    """rms_norm(x) * (1 + scale) + shift, (B, T, D).

    Token t of sample b uses row index[b, t] (int64) of scale and shift; without an index N is 1 and all tokens use it.
    """
    scale = rows_of_tokens(scale_BND, index_BT).float()
    shift = rows_of_tokens(shift_BND, index_BT).float()
    return torch.addcmul(shift, _rms_normalised(x_BTD, eps), 1 + scale).to(x_BTD.dtype)


def modulated_layer_norm(
    x_BTD: Tensor, scale_BND: Tensor, shift_BND: Tensor, index_BT: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (1 + scale) + shift over D, (B, T, D); rows as in `modulated_rms_norm`."""
    scale = rows_of_tokens(scale_BND, index_BT).float()
    shift = rows_of_tokens(shift_BND, index_BT).float()
    normalised = functional.layer_norm(x_BTD.float(), x_BTD.shape[-1:], eps=eps)
    return torch.addcmul(shift, normalised, 1 + scale).to(x_BTD.dtype)


def gated_residual(x_BTD: Tensor, branch_BTD: Tensor, gate_BND: Tensor, index_BT: Tensor | None) -> Tensor:
    """x + branch * gate, (B, T, D); rows of the gate are chosen as in `modulated_rms_norm`."""
    gate = rows_of_tokens(gate_BND, index_BT).float()
    return torch.addcmul(x_BTD.float(), branch_BTD.float(), gate).to(x_BTD.dtype)


def qk_norm_rope(
    x_BTD: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int, eps: float
) -> Tensor:
    """Norm, cut into heads, rotate: a query or key projection (B, T, D) to (B, H, T, K) with D = H * K.

    1. y = x / sqrt(mean(x^2 over ALL D channels, every head together) + eps) * weight.
    2. Head h takes channels h*K to (h+1)*K.
    3. With rotary = (cos, sin), float32 of (B, H, T, P), and y = (a, b) the two halves of a head's channels:
       (a cos - b sin, b cos + a sin).
    """
    y_BTD = _rms_normalised(x_BTD, eps) * weight_D.float()
    y_BHTK = y_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if rotary is not None:
        cos_BHTP, sin_BHTP = rotary
        a_BHTP, b_BHTP = y_BHTK.chunk(2, dim=-1)
        y_BHTK = torch.cat((a_BHTP * cos_BHTP - b_BHTP * sin_BHTP, b_BHTP * cos_BHTP + a_BHTP * sin_BHTP), dim=-1)
    return y_BHTK.to(x_BTD.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), any shape."""
    return functional.gelu(x, approximate="tanh")


def rows_of_tokens(rows_BND: Tensor, index_BT: Tensor | None) -> Tensor:
    """The row of each token, (B, T, D); without an index the single row itself, (B, 1, D), left to broadcast."""
    if index_BT is None:
        return rows_BND
    sample_B1 = torch.arange(index_BT.shape[0], device=index_BT.device)[:, None]
    return rows_BND[sample_B1, index_BT]


def _rms_normalised(x_BTD: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x_BTD.float(), x_BTD.shape[-1:], eps=eps)
