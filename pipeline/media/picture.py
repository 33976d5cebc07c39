"""One frame as the library knows it, and as red, green and blue for those who show it."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from pipeline.records.frames import YuvFrames

# Unlike the default, rounds colours to nearest, and does not depend on the processor's vector units.
SCALING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def picture_of(frames: YuvFrames, index: int) -> av.VideoFrame:
    """Frame `index` in memory of the library's own."""
    return av.VideoFrame.from_ndarray(frames.planes[index], format="yuv420p")


def rgb_of(frames: YuvFrames, index: int) -> np.ndarray:
    """Frame `index` as uint8 (height, width, 3), full range."""
    shown = picture_of(frames, index).reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=SCALING,
    )
    return shown.to_ndarray()
