"""Every operation of the video decoder in plain torch: the definition that a faster version must match.

Inputs may be float32, bfloat16 or float16. Arithmetic is float32 throughout and rounded once, to the dtype of the first
argument; float64 stays float64. No operation writes to its inputs, but one whose name ends in `_` to its first.

Shape suffixes: B batch, C channels, F frames, H height, W width, R = 3H/2 rows of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def framed(parts_BCFHW: Sequence[Tensor], margin: tuple[int, int], reflects: bool) -> Tensor:
    """The parts (B, C, f, H, W) one after the other along F, in a margin: (B, C, F, H + 2 rows, W + 2 columns).

    `margin` is rows and columns; it holds zeros, or what lies as far within the edge, the edge itself left out, and
    then is less than H and W. The result is `torch.channels_last_3d`.
    """
    rows, columns = margin
    joined_BCFHW = torch.cat(tuple(parts_BCFHW), dim=2)
    sides = (columns, columns, rows, rows, 0, 0)
    padded_BCFHW = functional.pad(joined_BCFHW, sides, mode="reflect" if reflects else "constant")
    return padded_BCFHW.contiguous(memory_format=torch.channels_last_3d)


def framed_norm_silu(
    parts_BCFHW: Sequence[Tensor], bias_C: Tensor | None, modulation: tuple[Tensor, Tensor] | None, eps: float,
    margin: tuple[int, int], reflects: bool,
) -> Tensor:  # fmt: skip
    """`framed` of y sigmoid(y), with z = part + bias and y = z / sqrt(mean(z^2 over C) + eps) * (1 + scale) + shift.

    `modulation` is scale and shift, (B, C, 1, 1, 1), or None for 0. Parts of float64 stay so.
    """

    def activated(part_BCFHW: Tensor) -> Tensor:
        x = _widened(part_BCFHW)
        if bias_C is not None:
            x = x + bias_C.to(x.dtype)[:, None, None, None]
        y = x / torch.sqrt(x.square().mean(dim=1, keepdim=True) + eps)
        if modulation is not None:
            scale, shift = modulation
            y = y * (1 + scale.to(y.dtype)) + shift.to(y.dtype)
        return functional.silu(y).to(part_BCFHW.dtype)

    return framed([activated(part_BCFHW) for part_BCFHW in parts_BCFHW], margin, reflects)


def add_with_bias_(x_BCFHW: Tensor, bias_C: Tensor, parts_BCFHW: Sequence[Tensor]) -> Tensor:
    """x + bias + the parts (B, C, f, H, W) one after the other along F; or x + bias, if there are none.

    Written to x, which is returned. Numbers of float64 stay so.
    """
    x = _widened(x_BCFHW)
    total_BCFHW = x + bias_C.to(x.dtype)[:, None, None, None]
    if parts_BCFHW:
        total_BCFHW += torch.cat(tuple(parts_BCFHW), dim=2)
    return x_BCFHW.copy_(total_BCFHW)


def rgb_to_yuv420(video_CFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures of red, green and blue in [-1,1] as I420: uint8 (F, R, W), Y and then U and V at half their size.

    ITU-R BT.709-6 in limited range: with E' = clamp(x/2 + 1/2, 0, 1) and L = 0.2126 R' + 0.7152 G' + 0.0722 B',
    Y = 16 + 219 L, U = 128 + 224 (B' - L) / 1.8556, V = 128 + 224 (R' - L) / 1.5748, halves rounded up. A sample of U
    and V lies on an even column, between two rows: it is of the mean colour of both rows' columns x-1, x, x+1, weighted
    1:2:1, where column 0 stands for the one before it. H and W are even.

    Also gives the number of values that are not finite, int32 (1,); where there are any, the bytes mean nothing.
    """
    _, num_frames, height, width = video_CFHW.shape
    num_wrong = (~torch.isfinite(video_CFHW)).sum(dtype=torch.int32).reshape(1)
    unit_CFHW = (video_CFHW.float() * 0.5 + 0.5).clamp(0, 1)
    on_column, after = unit_CFHW[..., 0::2], unit_CFHW[..., 1::2]
    before = torch.cat((on_column[..., :1], after[..., :-1]), dim=3)
    rows_CFHw = (before + after) * 0.25 + on_column * 0.5
    mean_CFhw = (rows_CFHw[:, :, 0::2] + rows_CFHw[:, :, 1::2]) * 0.5
    luma_Fhw = _luma(mean_CFhw)
    u_Fhw = 128 + (mean_CFhw[2] - luma_Fhw) * (224 / 1.8556)
    v_Fhw = 128 + (mean_CFhw[0] - luma_Fhw) * (224 / 1.5748)
    planes = [(plane + 0.5).to(torch.uint8).flatten(1) for plane in (16 + 219 * _luma(unit_CFHW), u_Fhw, v_Fhw)]
    return torch.cat(planes, dim=1).view(num_frames, height * 3 // 2, width), num_wrong


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _luma(rgb_CFHW: Tensor) -> Tensor:
    return 0.2126 * rgb_CFHW[0] + 0.7152 * rgb_CFHW[1] + 0.0722 * rgb_CFHW[2]
