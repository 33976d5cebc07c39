"""The still picture shown before a clip is played. Knows no clip: one frame in, one JPEG out."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pipeline.media.picture import rgb_of
from pipeline.records.frames import YuvFrames


def write_thumbnail(path: Path, frames: YuvFrames, *, quality: int, max_side_px: int = 512) -> None:
    """Write the first of `frames` as JPEG, reduced so that no side exceeds `max_side_px`.

    The same frame gives the same bytes. Raises OSError; a partial file is deleted.
    """
    picture = Image.fromarray(rgb_of(frames, 0))
    picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    try:
        picture.save(path, format="JPEG", quality=quality, optimize=True)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
