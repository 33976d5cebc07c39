"""Where the audio stream's work is queued: beside the video's on a GPU, so that its many small kernels hide there.

The two streams meet in each block's exchange only; between those, neither waits for the other. What one lane makes and
the other reads is lent to it, so that its memory is not given away before it was read. All of it works the same way
while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.rows import ScaledRows


class Lane:
    """A second queue of work on one device. Without a CUDA stream it is the caller's own, and nothing ever waits."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        # What either side may still read of what the other made.
        self._lent: tuple[Tensor | ScaledRows, ...] = ()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued here within comes after all that the caller has queued before, and before what it queues next.

        Also where an error ends it: a capture with a stream that was not joined would fail once more.
        """
        self._follow()
        try:
            yield
        finally:
            self._join()

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is queued inside goes to this lane."""
        with torch.cuda.stream(self._stream):
            yield

    def swap(self, made_here: Tensor | ScaledRows, made_by_caller: Tensor | ScaledRows) -> None:
        """Each side waits for the other's tensor, and may read it from now on, until the next swap."""
        if self._stream is None:
            return
        self._follow()
        self._join()
        # Each side now comes after the other's reading of what was lent before, so that memory may be given away. It is
        # held, not recorded with the allocator (`record_stream`), which while a graph is captured gives none of it away
        # before the end, and else not before the device, many blocks behind, has come so far.
        self._lent = made_here, made_by_caller

    def _follow(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._lent = ()


INLINE = Lane()
