"""The still picture shown before a clip is played. Knows no clip: one frame in, one JPEG out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_thumbnail(path: Path, frame: np.ndarray, *, quality: int, max_side_px: int = 512) -> None:
    """Write a uint8 RGB frame (height, width, 3) as JPEG, reduced so that no side exceeds `max_side_px`.

    The same frame gives the same bytes. Raises OSError; a partial file is deleted.
    """
    picture = Image.fromarray(frame)
    picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    try:
        picture.save(path, format="JPEG", quality=quality, optimize=True)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
