"""Linear layers with float8 weights: the precision tier in which the blocks' matrix products run on float8 numbers.

Weights carry one scale a row and activations one a token, found anew at each call. Which blocks stay as they are is the
caller's choice. The arithmetic is `kernels.reference.fp8_linear`.

Shape suffixes: B batch, T tokens, D channels in, N channels out.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from kernels.ops import OpSet
from kernels.rows import ScaledRows
from pipeline.model.attention import Attention
from pipeline.model.block import FeedForward
from pipeline.model.denoiser import AudioVideoDenoiser

# What the hardware multiplies: both sizes of a weight must be multiples of it.
SIZE_MULTIPLE = 16


class Fp8Linear(nn.Module):
    """A linear layer whose weight is float8 e4m3 times one scale a row."""

    weight: nn.Parameter
    weight_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, like: nn.Linear | Fp8Linear, ops: OpSet) -> None:
        super().__init__()
        self.ops = ops
        weight_ND = torch.empty_like(like.weight, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight_ND, requires_grad=False)
        self.bias = like.bias
        # Comes with the weight, not from the file, so it is no tensor of its own to those who fill modules.
        self.register_buffer("weight_scale", None, persistent=False)

    def set_weight(self, weight_ND: Tensor) -> None:
        """Quantise and keep."""
        self.set_scaled_weight(*self.ops.quantise_rows(weight_ND))

    def set_scaled_weight(self, weight_ND: Tensor, scale: Tensor) -> None:
        """Keep float8 numbers as they are; `scale` broadcasts to (N, 1)."""
        self.weight = nn.Parameter(weight_ND, requires_grad=False)
        self.weight_scale = scale.float().expand(weight_ND.shape[0], 1).contiguous()

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        """(B, T, D) to (B, T, N)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor | ScaledRows, bias: Tensor | None) -> Tensor:
        """As `forward`, with this bias."""
        if self.weight_scale is None:
            raise RuntimeError("the weight of a float8 layer must be set before it is used")
        rows = ScaledRows(*self.ops.quantise_rows(x), x.dtype) if isinstance(x, Tensor) else x
        return self.ops.fp8_linear(rows, self.weight, self.weight_scale, bias)


def use_fp8(denoiser: AudioVideoDenoiser, blocks: Container[int], ops: OpSet) -> None:
    """Give the named blocks (counted from 0) float8 linear layers in place of theirs, weights yet to be set.

    Head gates stay as they are (little work, much effect), and so do layers of sizes that the hardware does not take.
    """
    for index, block in enumerate(denoiser.blocks):
        for name, layer in list(block.named_modules()) if index in blocks else ():
            fits = isinstance(layer, nn.Linear) and not any(size % SIZE_MULTIPLE for size in layer.weight.shape)
            if fits and not name.endswith("to_gate_logits"):
                block.set_submodule(name, Fp8Linear(layer, ops))
        for module in block.modules() if index in blocks else ():
            if isinstance(module, Attention | FeedForward):
                plain = [name for name, layer in module.named_children() if isinstance(layer, nn.Linear)]
                module.in_float8 = set(plain) <= {"to_gate_logits"}
