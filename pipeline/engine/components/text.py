"""What the parts of the text path hand on: states from encoder to connectors, a context from those to the denoiser.

Shapes: B batch, S text tokens, D width, L hidden states of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# What takes the place of padding; text lengths are multiples of it. Published single files hold 128 whatever
# `connector_num_learnable_registers` says.
NUM_REGISTERS = 128


@dataclass(frozen=True)
class TextStates:
    """What a text encoder says of a prompt: hidden states, and which tokens are real (1) or padding (0)."""

    hidden_BSDL: Tensor
    mask_BS: Tensor


@dataclass(frozen=True)
class TextContext:
    """What the denoiser attends to: one context for each stream.

    `mask_BS` None: no padding is left, registers took its place. A model without sound has no audio context.
    """

    video_BSD: Tensor
    audio_BSD: Tensor | None
    mask_BS: Tensor | None = None

    def to(self, device: str) -> TextContext:
        """The same context on another device."""
        audio_BSD = None if self.audio_BSD is None else self.audio_BSD.to(device)
        mask_BS = None if self.mask_BS is None else self.mask_BS.to(device)
        return TextContext(self.video_BSD.to(device), audio_BSD, mask_BS)
