"""What a denoiser call is given: the two token streams, their distinct timesteps, and what of it outlasts a step.

Values only, with the conversions between them. Who makes noise, positions or text is not known here.

Shape suffixes: B batch, T tokens, S text tokens, C channels of a latent token, D channels of a text embedding,
A position axes (3 for video: time, height, width; 1 for audio: time), K distinct timesteps of a sample;
2 is [start, end).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.model.attention import KeysValues
from pipeline.model.rope import RotaryTable


@dataclass(frozen=True, eq=False)
class DistinctTimesteps:
    """The timesteps of all tokens as the few values that occur, so that each is embedded once and not once a token.

    Token t of sample b has timestep values_BK[b, index_BT[b, t]]; without an index K is 1 and all tokens share it.
    `values_BK` is float in [0, 1], `index_BT` int64.
    """

    values_BK: Tensor
    index_BT: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index_BT is None and self.values_BK.shape[1] != 1:
            raise ValueError(f"values_BK must have one column when there is no index, got {self.values_BK.shape[1]}")

    @classmethod
    def uniform(cls, sigma_B: Tensor) -> DistinctTimesteps:
        """All tokens of a sample at the sample's noise level."""
        return cls(sigma_B[:, None])

    @classmethod
    def from_tokens(cls, timesteps_BT: Tensor) -> DistinctTimesteps:
        """From one timestep a token.

        Looks at the values, so on an accelerator it waits for them: call it once a clip on the denoise mask and use
        `scaled` at each step.
        """
        found = [torch.unique(row_T, return_inverse=True) for row_T in timesteps_BT]
        num_values = max(values.numel() for values, _ in found)
        # A sample with fewer values repeats its last one; no token points there.
        values_BK = torch.stack([torch.cat((v, v[-1:].expand(num_values - v.numel()))) for v, _ in found])
        if num_values == 1:
            return cls(values_BK)
        return cls(values_BK, torch.stack([index_T for _, index_T in found]))

    def scaled(self, sigma_B: Tensor) -> DistinctTimesteps:
        """Each value times its sample's noise level: denoise mask in, timesteps out."""
        return DistinctTimesteps(self.values_BK * sigma_B[:, None], self.index_BT)

    def per_token(self, num_tokens: int) -> Tensor:
        """The timestep of each token, (B, T): what x0 = latent - timestep * velocity needs."""
        if self.index_BT is None:
            return self.values_BK.expand(-1, num_tokens)
        return self.values_BK.gather(1, self.index_BT)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One stream of a call. Positions are seconds for time and pixels for height and width.

    `text_mask_BS` is 1 to keep and 0 to drop a text token; the published pipelines give none. `attention_mask_BTT`
    weighs in [0, 1] how much a token (row) may see another (column). Positions and masks may have batch size 1.
    `keyframes_mask_BT` is 1 for tokens of latents that stand for a single frame and 0 for the others; models with a
    learned keyframe marker need it, the others ignore it.
    """

    tokens_BTC: Tensor
    timesteps: DistinctTimesteps
    sigma_B: Tensor
    positions_BAT2: Tensor
    text_BSD: Tensor
    text_mask_BS: Tensor | None = None
    attention_mask_BTT: Tensor | None = None
    keyframes_mask_BT: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StreamConditioning:
    """What one stream's blocks are given that does not change from step to step.

    `text_BSD` has the stream's width; `text_keys_values` are those of each block's text attention, None where they
    depend on the noise level. The biases are additive, broadcast to (B, heads, queries, keys), and
    None where everything is seen. The rotary table of the exchange knows time only, which the streams have in common.
    """

    text_BSD: Tensor
    text_keys_values: tuple[KeysValues, ...] | None
    text_bias: Tensor | None
    self_bias: Tensor | None
    rotary: RotaryTable
    exchange_rotary: RotaryTable | None


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Computed once a clip by `AudioVideoDenoiser.prepare`, reused at each step."""

    video: StreamConditioning | None
    audio: StreamConditioning | None


SkipStrategy = Literal["values", "attention", "residual", "block"]
"""What a perturbed sample has in place of self-attention.

"values": its value projection; "attention": its input; both still go through the output projection and the gate.
"block": nothing, and nothing in place of the whole block either. "residual": attention as ever, because LTX-Video 0.1.2
takes away a residual connection inside attention that its blocks do not have.
"""


@dataclass(frozen=True)
class Perturbation:
    """What one sample of the batch goes without, to be compared with the sample that has it.

    In the blocks named (counted from 0), self-attention is replaced as the strategy says. An isolated sample's streams
    take nothing from each other in any block. Strategies other than "values" are LTX-Video's: models with audio have
    none of them.
    """

    video_self_attention: frozenset[int] = frozenset()
    audio_self_attention: frozenset[int] = frozenset()
    isolate_streams: bool = False
    strategy: SkipStrategy = "values"


def text_bias(mask_BS: Tensor | None, dtype: torch.dtype, hidden: float | None = None) -> Tensor | None:
    """0 where text is kept and `hidden` where it is dropped (None: the most negative number), (B, 1, 1, S)."""
    if mask_BS is None:
        return None
    dropped = torch.finfo(dtype).min if hidden is None else hidden
    return torch.zeros_like(mask_BS, dtype=dtype).masked_fill(mask_BS == 0, dropped)[:, None, None, :]


def attention_bias(mask_BTT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """log(mask), the most negative number where the mask is 0, (B, 1, T, T): LTX-2 release 1.2.0 behaviour."""
    if mask_BTT is None:
        return None
    # The most negative float32 would round to -inf in bfloat16, so zeros are filled in after the cast.
    bias_BTT = mask_BTT.float().log().to(dtype)
    return bias_BTT.masked_fill(mask_BTT == 0, torch.finfo(dtype).min)[:, None]
