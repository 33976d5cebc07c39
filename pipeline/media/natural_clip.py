"""A clip to time an encoder with: made by rule, and to an encoder what filmed pictures are.

Untrained weights decode to noise, which costs x264 three times what a film does. Here a texture whose power falls with
the square of the spatial frequency, as in photographs (Field, "Relations between the statistics of natural images and
the response properties of cortical cells", 1987), passes under a camera that swings, and every frame has grain of its
own. Knows no model; what frames are written with is `mux.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.media.mux import EncodeSettings, write_clip
from pipeline.records.frames import YuvFrames

FPS = 24.0
# Levels of limited range: mean and standard deviation of luma, standard deviations of chroma and of the grain.
LUMA_MEAN, LUMA_STD, CHROMA_STD, GRAIN_STD = 110.0, 40.0, 12.0, 1.5
# The camera swings so far, in pixels, and so long, in frames: 3 pixels a frame at most.
SWING_PX, SWING_FRAMES = 48.0, 100.0
_CHUNK_FRAMES = 8


@dataclass(frozen=True)
class EncodeTiming:
    """What a clip took the encoder alone, and how large it became."""

    encode_s: float
    num_frames: int
    size_bytes: int


def time_encode(path: Path, settings: EncodeSettings, *, width: int, height: int, num_frames: int) -> EncodeTiming:
    """Write the clip to `path` as a worker does, but for the sound, with all frames made beforehand."""
    chunks = list(natural_clip(width, height, num_frames))
    report = write_clip(path, iter(chunks), None, fps=FPS, num_frames=num_frames, sample_rate_hz=0, settings=settings)
    return EncodeTiming(report.encode_busy_s, num_frames, path.stat().st_size)


def natural_clip(width: int, height: int, num_frames: int, seed: int = 0) -> Iterator[YuvFrames]:
    """Chunks of frames; the same arguments give the same bytes. `width` and `height` are even."""
    generator = np.random.default_rng(seed)
    margin = 2 * math.ceil(SWING_PX) + 2
    luma = LUMA_MEAN + LUMA_STD * _texture(generator, height + margin, width + margin)
    # As fine as luma is at its own size: at half of it, twice as fine.
    chroma = [128 + CHROMA_STD * _texture(generator, (height + margin) // 2, (width + margin) // 2) for _ in range(2)]
    for first in range(0, num_frames, _CHUNK_FRAMES):
        frames = []
        for index in range(first, min(first + _CHUNK_FRAMES, num_frames)):
            down, right = camera_at(index)
            grain = generator.standard_normal((height, width), dtype=np.float32) * np.float32(GRAIN_STD)
            picture = _window(luma, down, right, height, width) + grain
            colours = [_window(plane, down / 2, right / 2, height // 2, width // 2) for plane in chroma]
            frames.append([_levels(picture, 235), *(_levels(plane, 240) for plane in colours)])
        yield YuvFrames.joined(*(np.stack(planes) for planes in zip(*frames, strict=True)))


def camera_at(frame: int) -> tuple[float, float]:
    """How far down and right of the texture's corner the camera looks, in pixels of luma."""
    turn = 2 * math.pi * frame / SWING_FRAMES
    return SWING_PX * (1 + math.sin(turn + 1)), SWING_PX * (1 + math.cos(turn))


def _texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of mean 0 and deviation 1 whose amplitude is one over its spatial frequency, float32."""
    spectrum = np.fft.rfft2(generator.standard_normal((height, width), dtype=np.float32))
    cycles_a_pixel = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    # The slowest waves would be one gradient over all.
    spectrum /= np.maximum(cycles_a_pixel, 2 / max(height, width))
    spectrum[0, 0] = 0
    texture: np.ndarray = np.fft.irfft2(spectrum, s=(height, width)).astype(np.float32)
    texture /= texture.std()
    return texture


def _window(plane: np.ndarray, down: float, right: float, height: int, width: int) -> np.ndarray:
    """A part of the plane at a corner between its samples, by linear interpolation."""
    (row, below), (column, beside) = (divmod(corner, 1.0) for corner in (down, right))
    part = plane[int(row) : int(row) + height + 1, int(column) : int(column) + width + 1]
    across = part[:, :-1] * np.float32(1 - beside) + part[:, 1:] * np.float32(beside)
    window: np.ndarray = across[:-1] * np.float32(1 - below) + across[1:] * np.float32(below)
    return window


def _levels(plane: np.ndarray, largest: int) -> np.ndarray:
    return (plane + np.float32(0.5)).clip(16, largest).astype(np.uint8)
