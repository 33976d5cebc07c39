"""Pictures as an encoder takes them: what the engine hands out, and the buffer, the muxer and the thumbnail take.

Shapes: F frames, H height, W width, R = 3H/2 rows of bytes, h and w half of H and W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, eq=False)
class YuvFrames:
    """Frames of limited-range BT.709 at 4:2:0, uint8 (F, R, W): each is Y (H, W), then U (h, w), then V (h, w) (I420).

    H and W are even. Samples of U and V lie on even columns, between two rows, which is where H.264 puts them unless it
    is told otherwise.
    """

    planes: np.ndarray

    @classmethod
    def joined(cls, y: np.ndarray, u: np.ndarray, v: np.ndarray) -> Self:
        """Frames of three separate planes."""
        num_frames, height, width = y.shape
        flat = [plane.reshape(num_frames, -1) for plane in (y, u, v)]
        return cls(np.concatenate(flat, axis=1).reshape(num_frames, height * 3 // 2, width))

    @property
    def num_frames(self) -> int:
        return int(self.planes.shape[0])

    @property
    def height(self) -> int:
        return int(self.planes.shape[1]) * 2 // 3

    @property
    def width(self) -> int:
        return int(self.planes.shape[2])

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes

    @property
    def y(self) -> np.ndarray:
        return self.planes[:, : self.height]

    @property
    def u(self) -> np.ndarray:
        return self._chroma(0)

    @property
    def v(self) -> np.ndarray:
        return self._chroma(1)

    def _chroma(self, index: int) -> np.ndarray:
        flat = self.planes.reshape(self.num_frames, 6, -1)[:, 4 + index]
        return flat.reshape(self.num_frames, self.height // 2, self.width // 2)
