"""Pixel, latent and token shapes: the only shape arithmetic in the project. Pure integers, no tensors.

The grids are those of the LTX video VAE (32x32 pixels and 8 frames a latent cell, first frame alone) and of the
LTX-2 audio VAE (25 latents a second). Source: the published model configurations, restated in
`conf/model/*.yaml` where they differ between models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SPATIAL_CELL_PX = 32
TEMPORAL_CELL_FRAMES = 8
AUDIO_LATENTS_PER_SECOND = 25.0
# A duration of exactly n frames, given in seconds as a double, may come out a hair above n.
FRAME_TOLERANCE = 1e-6


@dataclass(frozen=True)
class PixelShape:
    """A clip as a viewer sees it: frames, height and width in pixels, frames a second."""

    num_frames: int
    height: int
    width: int
    fps: float

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps


@dataclass(frozen=True)
class LatentShape:
    """A clip as the denoiser sees it: latent frames, height, width (one token each) and audio latents."""

    num_frames: int
    height: int
    width: int
    num_audio_latents: int
    fps: float

    @property
    def num_video_tokens(self) -> int:
        return self.num_frames * self.height * self.width


def latent_shape(pixels: PixelShape) -> LatentShape:
    """Latent shape of a clip whose size lies on the grid; ValueError if it does not."""
    if not is_on_frame_grid(pixels.num_frames):
        raise ValueError(f"num_frames must be {TEMPORAL_CELL_FRAMES}k+1, got {pixels.num_frames}")
    for name, size in (("height", pixels.height), ("width", pixels.width)):
        if size % SPATIAL_CELL_PX:
            raise ValueError(f"{name} must be a multiple of {SPATIAL_CELL_PX}, got {size}")
    return LatentShape(
        num_frames=(pixels.num_frames - 1) // TEMPORAL_CELL_FRAMES + 1,
        height=pixels.height // SPATIAL_CELL_PX,
        width=pixels.width // SPATIAL_CELL_PX,
        num_audio_latents=num_audio_latents(pixels.num_frames, pixels.fps),
        fps=pixels.fps,
    )


def num_audio_latents(num_frames: int, fps: float) -> int:
    """Audio latents of a clip: 25 a second, rounded half to even as the reference does."""
    return round(num_frames / fps * AUDIO_LATENTS_PER_SECOND)


def is_on_frame_grid(num_frames: int) -> bool:
    return num_frames >= 1 and (num_frames - 1) % TEMPORAL_CELL_FRAMES == 0


def nearest_frame_counts(num_frames: int) -> tuple[int, int]:
    """The largest frame count on the grid below `num_frames` (at least 1) and the smallest above it."""
    below = max(1, (num_frames - 1) // TEMPORAL_CELL_FRAMES * TEMPORAL_CELL_FRAMES + 1)
    return below, below + TEMPORAL_CELL_FRAMES


def frames_for_duration(duration_s: float, fps: float) -> int:
    """Smallest frame count on the grid that lasts at least `duration_s`."""
    frames = max(1, math.ceil(duration_s * fps - FRAME_TOLERANCE))
    return math.ceil((frames - 1) / TEMPORAL_CELL_FRAMES) * TEMPORAL_CELL_FRAMES + 1


def next_on_grid(size_px: int, grid_px: int) -> int:
    """Smallest multiple of `grid_px` that is at least `size_px`."""
    return -(-size_px // grid_px) * grid_px


@dataclass(frozen=True)
class RenderShape:
    """What is asked for, and the size on the grid that is rendered and then cropped to the centre."""

    asked: PixelShape
    rendered: PixelShape

    @property
    def crop_top_px(self) -> int:
        return (self.rendered.height - self.asked.height) // 2

    @property
    def crop_left_px(self) -> int:
        return (self.rendered.width - self.asked.width) // 2


def render_shape(asked: PixelShape, grid_px: int) -> RenderShape:
    """The shape to render for `asked`: each side rounded up to the recipe's grid."""
    rendered = PixelShape(
        asked.num_frames, next_on_grid(asked.height, grid_px), next_on_grid(asked.width, grid_px), asked.fps
    )
    return RenderShape(asked, rendered)
