"""The shapes that a command names, such as 768x512x121: width and height in pixels, and frames. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.errors import UsageError
from pipeline.geometry import SPATIAL_CELL_PX, PixelShape, is_on_frame_grid


def clips_named(names: Sequence[str], fps: float) -> dict[str, PixelShape]:
    """The clips by their names. UsageError for a name that is none, or a size off the grid."""
    return {name: _clip_named(name, fps) for name in names}


def _clip_named(name: str, fps: float) -> PixelShape:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", name):
        width, height, num_frames = map(int, name.split("x"))
        if width % SPATIAL_CELL_PX == height % SPATIAL_CELL_PX == 0 and is_on_frame_grid(num_frames):
            return PixelShape(num_frames, height, width, fps)
    raise UsageError(
        f"shapes must be like 768x512x121, with sides that are multiples of {SPATIAL_CELL_PX} pixels and 8k+1 frames, "
        f"got {name!r}; see --help"
    )
