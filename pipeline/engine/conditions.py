"""Pictures that a clip is held to: which tokens they are, what those are held to, and how firmly.

How a picture becomes latents is in the components, when it does in `engine.py`; the loop that honours a hold is in
`denoise.py`.

Shapes: B batch, C channels, H latent height, W latent width, T video tokens, those appended last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.engine.latents import Tokens, keyframe_positions, patchify_video, video_positions
from pipeline.geometry import TEMPORAL_CELL_FRAMES, LatentShape


@dataclass(frozen=True)
class HeldPicture:
    """A picture's latents (B,C,1,H,W), the pixel frame that shows it, and how firmly: 1 exactly, 0 not at all."""

    latent_BC1HW: Tensor
    frame: int
    strength: float


@dataclass(frozen=True)
class Hold:
    """What each video token is held to: at `mask_BT` 0 it is `clean_BTC`, at 1 it is free.

    The picture of frame 0 takes the place of the first latent frame. Every other one is appended, seen by the clip and
    taken away at the end, because a latent later in the clip stands for eight pictures.
    """

    clean_BTC: Tensor
    mask_BT: Tensor
    positions_B3T2: Tensor

    def blend(self, video_BTC: Tensor) -> Tensor:
        """The tokens moved to what they are held to."""
        return torch.lerp(self.clean_BTC, video_BTC, self.mask_BT[..., None])


def num_appended_tokens(frames: Sequence[int], shape: LatentShape) -> int:
    """Tokens that pictures at these pixel frames add to a clip."""
    return sum(frame != 0 for frame in frames) * shape.height * shape.width


def append_tokens(tokens: Tokens, count: int) -> Tokens:
    """`tokens` with `count` zeros after the video's."""
    batch, _, channels = tokens.video_BTC.shape
    zeros_BTC = tokens.video_BTC.new_zeros(batch, count, channels)
    return Tokens(torch.cat((tokens.video_BTC, zeros_BTC), dim=1), tokens.audio_BTC)


def drop_appended(tokens: Tokens, shape: LatentShape) -> Tokens:
    """Only the clip's own tokens."""
    return Tokens(tokens.video_BTC[:, : shape.num_video_tokens], tokens.audio_BTC)


def hold_to(pictures: Sequence[HeldPicture], tokens: Tokens, shape: LatentShape) -> Hold | None:
    """The hold of `tokens`, which have place for the appended ones already; None without pictures.

    ValueError if a picture lies outside the clip or has another size.
    """
    if not pictures:
        return None
    clean_BTC = torch.zeros_like(tokens.video_BTC)
    mask_BT = torch.ones(clean_BTC.shape[:2], device=clean_BTC.device)
    positions = [video_positions(shape, device=clean_BTC.device)]
    each, end = shape.height * shape.width, shape.num_video_tokens
    last_frame = TEMPORAL_CELL_FRAMES * (shape.num_frames - 1)
    for picture in pictures:
        if not 0 <= picture.frame <= last_frame:
            raise ValueError(f"a picture's frame must be 0 to {last_frame}, got {picture.frame}")
        size = tuple(picture.latent_BC1HW.shape[2:])
        if size != (1, shape.height, shape.width):
            raise ValueError(f"a picture must have {(1, shape.height, shape.width)} latents, got {size}")
        at = 0 if picture.frame == 0 else end
        clean_BTC[:, at : at + each] = patchify_video(picture.latent_BC1HW)
        mask_BT[:, at : at + each] = 1 - picture.strength
        if picture.frame:
            positions.append(keyframe_positions(shape, picture.frame, device=clean_BTC.device))
            end += each
    return Hold(clean_BTC, mask_BT, torch.cat(positions, dim=2))
