"""Every operation of the denoiser in plain torch: the definition that a faster version must match.

Inputs may be float32, bfloat16 or float16. Except for attention, arithmetic is float32 throughout and rounded once, to
the dtype of the first argument. No operation writes to its inputs.

Shape suffixes: B batch, T tokens, S keys, D channels of a token, H heads, K channels of a head, P = K/2,
N distinct timesteps of a sample. A size of 1 at B broadcasts. Of a linear layer: M rows of input, D channels in, N out.
Of block-sparse attention: Q blocks of queries, N blocks of keys, or of those that each block of queries sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kernels.rows import Modulation, ScaledRows

FP8_MAX = 448.0
"""Largest number of float8 e4m3."""

BLOCK_TOKENS = 128
"""Queries, and keys, of a block of block-sparse attention."""

# Logits of so many heads are held at a time: at 32,640 keys, 0.13 GB in bfloat16 and twice that in float32.
_HEADS_AT_A_TIME = 8


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, (B, H, T, K), in the dtype of q.

    `bias` broadcasts to (B, H, T, S), has the dtype of q and is finite, so a row of nothing but hidden keys is an even
    mean and never NaN.
    """
    return functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias)


def attention_with_lse(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`attention`, and log(sum over S of exp(q k^T / sqrt(K) + bias)), float32 (B, H, T).

    With the second, attention over parts of the keys adds up to attention over all of them: each part weighs
    exp(its own - that of all). Arithmetic is float32. There must be at least one key.
    """
    scores_BHTS = q_BHTK.float() @ k_BHSK.float().transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
    if bias is not None:
        scores_BHTS = scores_BHTS + bias.float()
    mixed_BHTK = scores_BHTS.softmax(dim=-1) @ v_BHSK.float()
    return mixed_BHTK.to(q_BHTK.dtype), scores_BHTS.logsumexp(dim=-1)


def block_sparse_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, seen_BHQN: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys of the seen blocks only, (B, H, T, K), in the dtype of q.

    Block i is tokens 128 i to 128 (i + 1), the last one perhaps fewer, so Q is T / 128 rounded up. `seen_BHQN` (int32)
    names the blocks of keys that a block of queries sees, in ascending order, none twice.
    """
    num_keys = k_BHSK.shape[2]
    padding = -num_keys % BLOCK_TOKENS
    k_BHSK, v_BHSK = (functional.pad(x_BHSK, (0, 0, 0, padding)) for x_BHSK in (k_BHSK, v_BHSK))
    place_N = torch.arange(BLOCK_TOKENS, device=q_BHTK.device)
    mixed = []
    for block, q_BHLK in enumerate(q_BHTK.split(BLOCK_TOKENS, dim=2)):
        index_BHL = (seen_BHQN[:, :, block, :, None].long() * BLOCK_TOKENS + place_N).flatten(2)
        index_BHLK = index_BHL[..., None].expand(-1, -1, -1, k_BHSK.shape[3])
        hidden_BH1L = (index_BHL >= num_keys)[:, :, None]
        bias_BH1L = torch.zeros_like(hidden_BH1L, dtype=q_BHLK.dtype).masked_fill(hidden_BH1L, -torch.inf)
        k_BHLK, v_BHLK = (x_BHSK.gather(2, index_BHLK) for x_BHSK in (k_BHSK, v_BHSK))
        mixed.append(attention(q_BHLK, k_BHLK, v_BHLK, bias_BH1L if padding else None))
    return torch.cat(mixed, dim=2)


def block_promise(q_BHTK: Tensor, k_BHSK: Tensor) -> Tensor:
    """log of the sum over a block's keys of exp(q k / sqrt(K)), for each block's mean query, float32 (B, H, Q, N).

    N is all blocks of keys, and a last block that is short has fewer queries to its mean and fewer keys to its sum. The
    mean is rounded to the dtype of q once it is divided by sqrt(K), and so are its products with the keys, which a
    faster version may leave in float32.
    """
    padding = -k_BHSK.shape[2] % BLOCK_TOKENS
    promise = []
    for q_BhTK, k_BhSK in zip(
        q_BHTK.split(_HEADS_AT_A_TIME, dim=1), k_BHSK.split(_HEADS_AT_A_TIME, dim=1), strict=True
    ):
        mean_BhQK = (block_means(q_BhTK) / math.sqrt(q_BhTK.shape[-1])).to(q_BhTK.dtype)
        logits_BhQS = mean_BhQK @ k_BhSK.transpose(2, 3)
        if padding:
            logits_BhQS = functional.pad(logits_BhQS, (0, padding), value=-torch.inf)
        promise.append(logits_BhQS.float().unflatten(-1, (-1, BLOCK_TOKENS)).logsumexp(dim=-1))
    return torch.cat(promise, dim=1)


def chosen_blocks(promise_BHQN: Tensor, always_QN: Tensor, num_seen: int) -> Tensor:
    """The `num_seen` blocks of keys that each block of queries sees, int32 (B, H, Q, num_seen), in ascending order.

    Those that `always_QN` (bool) marks, `num_seen` at most, then those that promise most; of equal ones the first.
    """
    promise_BHQN = promise_BHQN.masked_fill(always_QN, torch.inf)
    best_BHQN = promise_BHQN.sort(dim=-1, descending=True, stable=True).indices[..., :num_seen]
    return best_BHQN.sort(dim=-1).values.int()


def block_means(x_BHTK: Tensor) -> Tensor:
    """The mean of each block of tokens, float32 (B, H, Q, K); the last one's over as many as it has."""
    num_whole = x_BHTK.shape[2] // BLOCK_TOKENS * BLOCK_TOKENS
    whole, rest = x_BHTK[:, :, :num_whole], x_BHTK[:, :, num_whole:]
    means = [whole.unflatten(2, (-1, BLOCK_TOKENS)).mean(dim=3, dtype=torch.float32)] if num_whole else []
    if rest.shape[2]:
        means.append(rest.mean(dim=2, keepdim=True, dtype=torch.float32))
    return torch.cat(means, dim=2)


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


def modulated_rms_norm_quantised(
    x_BTD: Tensor, scale_BND: Tensor, shift_BND: Tensor, index_BT: Tensor | None, eps: float
) -> ScaledRows:
    """quantise_rows(modulated_rms_norm(...))."""
    return _scaled(modulated_rms_norm(x_BTD, scale_BND, shift_BND, index_BT, eps))


def modulated_layer_norm(
    x_BTD: Tensor, scale_BND: Tensor, shift_BND: Tensor, index_BT: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (1 + scale) + shift over D, (B, T, D); rows as in `modulated_rms_norm`."""
    scale = rows_of_tokens(scale_BND, index_BT).float()
    shift = rows_of_tokens(shift_BND, index_BT).float()
    normalised = functional.layer_norm(x_BTD.float(), x_BTD.shape[-1:], eps=eps)
    return torch.addcmul(shift, normalised, 1 + scale).to(x_BTD.dtype)


def gated_residual(x_BTD: Tensor, branch_BTD: Tensor, gate_BND: Tensor | None, index_BT: Tensor | None) -> Tensor:
    """x + branch * gate, (B, T, D); rows of the gate are chosen as in `modulated_rms_norm`. Without a gate it is 1."""
    if gate_BND is None:
        return x_BTD + branch_BTD
    gate = rows_of_tokens(gate_BND, index_BT).float()
    return (branch_BTD * gate).add_(x_BTD).to(x_BTD.dtype)


def gated_residual_norm(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BND: Tensor | None,
    gate_index_BT: Tensor | None,
    modulation: Modulation | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x' = gated_residual(...) and the norm of x' with this modulation, or plain without one, (B, T, D) each."""
    x_BTD = gated_residual(x_BTD, branch_BTD, gate_BND, gate_index_BT)
    y_BTD = rms_norm(x_BTD, eps) if modulation is None else modulated_rms_norm(x_BTD, *modulation, eps)
    return x_BTD, y_BTD


def gated_residual_norm_quantised(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BND: Tensor | None,
    gate_index_BT: Tensor | None,
    modulation: Modulation | None,
    eps: float,
) -> tuple[Tensor, ScaledRows]:
    """`gated_residual_norm`, the normed tensor as float8 rows."""
    x_BTD, y_BTD = gated_residual_norm(x_BTD, branch_BTD, gate_BND, gate_index_BT, modulation, eps)
    return x_BTD, _scaled(y_BTD)


def qk_norm_rope(
    x_BTD: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int, eps: float
) -> Tensor:
    """Norm, cut into heads, rotate: a query or key projection (B, T, D) to (B, H, T, K) with D = H * K.

    1. y = x / sqrt(mean(x^2 over ALL D channels, every head together) + eps) * weight.
    2. Head h takes channels h*K to (h+1)*K.
    3. With rotary = (cos, sin), float32 of (B, H, T, P), and y = (a, b) the two halves of a head's channels:
       (a cos - b sin, b cos + a sin).
    """
    y_BHTK = _heads(_rms_normalised(x_BTD, eps), weight_D, num_heads)
    if rotary is not None:
        y_BHTK = _rotated(y_BHTK, rotary, _halves)
    return y_BHTK.to(x_BTD.dtype)


def qk_norm_rope_interleaved(
    x_BTD: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int, eps: float
) -> Tensor:
    """As `qk_norm_rope`, but a and b are the even and the odd channels of a head, and stay where they were."""
    y_BHTK = _heads(_rms_normalised(x_BTD, eps), weight_D, num_heads)
    if rotary is not None:
        y_BHTK = _rotated(y_BHTK, rotary, _neighbours)
    return y_BHTK.to(x_BTD.dtype)


def qk_norm_rope_both(
    q_BTD: Tensor, k_BTD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, rotary: tuple[Tensor, Tensor],
    num_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`qk_norm_rope` of queries and of keys of the same tokens, whose rotations are the same."""
    return qk_norm_rope(q_BTD, q_weight_D, rotary, num_heads, eps), qk_norm_rope(
        k_BTD, k_weight_D, rotary, num_heads, eps
    )


def qk_norm_rope_both_interleaved(
    q_BTD: Tensor, k_BTD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, rotary: tuple[Tensor, Tensor],
    num_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `qk_norm_rope_both`, with the pairs of `qk_norm_rope_interleaved`."""
    return qk_norm_rope_interleaved(q_BTD, q_weight_D, rotary, num_heads, eps), qk_norm_rope_interleaved(
        k_BTD, k_weight_D, rotary, num_heads, eps
    )


def sum_of_squares(x_BTD: Tensor) -> Tensor:
    """Over all D channels of each token, float32 (B, T, 1): what a norm needs of channels that are held apart."""
    return torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32).square()


def qk_scale_rope(
    x_BTD: Tensor, inverse_BT1: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int
) -> Tensor:
    """`qk_norm_rope` where the norm runs over more channels than these: `inverse` is its 1 / sqrt(mean + eps).

    float32 (B, T, 1); y = x * inverse * weight in step 1, all else as there.
    """
    y_BHTK = _heads(x_BTD * inverse_BT1, weight_D, num_heads)
    if rotary is not None:
        y_BHTK = _rotated(y_BHTK, rotary, _halves)
    return y_BHTK.to(x_BTD.dtype)


def qk_scale_rope_interleaved(
    x_BTD: Tensor, inverse_BT1: Tensor, weight_D: Tensor, rotary: tuple[Tensor, Tensor] | None, num_heads: int
) -> Tensor:
    """As `qk_scale_rope`, with the pairs of `qk_norm_rope_interleaved`."""
    y_BHTK = _heads(x_BTD * inverse_BT1, weight_D, num_heads)
    if rotary is not None:
        y_BHTK = _rotated(y_BHTK, rotary, _neighbours)
    return y_BHTK.to(x_BTD.dtype)


def gate_heads(x_BTD: Tensor, logits_BTH: Tensor) -> Tensor:
    """Head h of x, channels h*K to (h+1)*K, times 2 * sigmoid(logits[..., h]); (B, T, D)."""
    gate_BTH1 = 2 * torch.sigmoid(logits_BTH.float())[..., None]
    return (x_BTD.float().unflatten(-1, (logits_BTH.shape[-1], -1)) * gate_BTH1).flatten(-2).to(x_BTD.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), any shape."""
    return functional.gelu(x, approximate="tanh")


def gelu_quantised(x_BTD: Tensor) -> ScaledRows:
    """quantise_rows(gelu_tanh(x))."""
    return _scaled(gelu_tanh(x_BTD))


def linear_gelu(x_BTD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """gelu_tanh(x W^T + bias), (B, T, N)."""
    return gelu_tanh(functional.linear(x_BTD, weight_ND, bias_N))


def quantise_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """x as float8 e4m3, (M, D) or any (..., D), and one float32 scale a row, (M, 1): x is about fp8 * scale.

    scale = max|row| / 448, so the largest value of a row becomes the largest of the format; 1 for a row of zeros.
    """
    return quantise_rows_to(x_MD, row_peaks(x_MD))


def row_peaks(x_MD: Tensor) -> Tensor:
    """max|row|, float32 (M, 1): what `quantise_rows` needs of rows that are held apart."""
    return x_MD.abs().amax(dim=-1, keepdim=True).float()


def quantise_rows_to(x_MD: Tensor, peak_M1: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` where `peak` is the largest number of longer rows of which these are parts, float32 (M, 1)."""
    scale_M1 = torch.where(peak_M1 > 0, peak_M1 / FP8_MAX, torch.ones_like(peak_M1))
    return (x_MD.float() / scale_M1).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale_M1


def fp8_linear(rows: ScaledRows, weight_ND: Tensor, weight_scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + bias over float8 values, (B, T, N), in the dtype that the rows stand for: W = weight * weight_scale.

    Both factors are exact in float32 and so is the sum of their products, up to its own rounding.
    """
    y_BTN = rows.values_BTD.float() @ weight_ND.float().t() * rows.scale_BT1 * weight_scale_N1.t()
    if bias_N is not None:
        y_BTN = y_BTN + bias_N.float()
    return y_BTN.to(rows.dtype)


def rows_of_tokens(rows_BND: Tensor, index_BT: Tensor | None) -> Tensor:
    """The row of each token, (B, T, D); without an index the single row itself, (B, 1, D), left to broadcast."""
    if index_BT is None:
        return rows_BND
    sample_B1 = torch.arange(index_BT.shape[0], device=index_BT.device)[:, None]
    return rows_BND[sample_B1, index_BT]


def _scaled(x_BTD: Tensor) -> ScaledRows:
    return ScaledRows(*quantise_rows(x_BTD), x_BTD.dtype)


def _rms_normalised(x_BTD: Tensor, eps: float) -> Tensor:
    """In float32. Reads x twice and casts on the way: a float32 copy of it would be written and read once more."""
    norm_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
    return x_BTD * torch.rsqrt(norm_BT1.square() / x_BTD.shape[-1] + eps)


def _heads(normed_BTD: Tensor, weight_D: Tensor, num_heads: int) -> Tensor:
    """Writes to its first argument, which is float32."""
    return normed_BTD.mul_(weight_D).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _halves(whole: Tensor) -> tuple[Tensor, ...]:
    return whole.chunk(2, dim=-1)


def _neighbours(whole: Tensor) -> tuple[Tensor, ...]:
    return whole.unflatten(-1, (-1, 2)).unbind(dim=-1)


def _rotated(y_BHTK: Tensor, rotary: tuple[Tensor, Tensor], halves: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    """Every pair (a, b) of the `halves` of y turned, written straight to its place in the result."""
    (a_BHTP, b_BHTP), (cos_BHTP, sin_BHTP) = halves(y_BHTK), rotary
    turned_BHTK = torch.empty(y_BHTK.shape, dtype=y_BHTK.dtype, device=y_BHTK.device)
    first_BHTP, second_BHTP = halves(turned_BHTK)
    torch.mul(a_BHTP, cos_BHTP, out=first_BHTP).addcmul_(b_BHTP, sin_BHTP, value=-1)
    torch.mul(b_BHTP, cos_BHTP, out=second_BHTP).addcmul_(a_BHTP, sin_BHTP)
    return turned_BHTK
