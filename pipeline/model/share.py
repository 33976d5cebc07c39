"""The part of a denoiser that is computed here where several devices compute it together.

A value only. What is cut by it is known where it is cut; how parts are put together again, in `pipeline/parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass

Region = tuple[slice, ...]
"""Of a tensor: one slice a dimension, from the first on; the whole tensor if there are none."""


@dataclass(frozen=True)
class Share:
    """Part `index` of `number` equal ones, in order."""

    index: int
    number: int

    def of(self, size: int) -> slice:
        """Which of `size` things in a row, a multiple of `number`."""
        part = size // self.number
        return slice(self.index * part, (self.index + 1) * part)


WHOLE = Share(0, 1)
