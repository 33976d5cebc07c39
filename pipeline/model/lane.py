"""Where the audio stream's work is queued: beside the video's on a GPU, so that its many small kernels hide there.

The two streams meet in each block's exchange only; between those, neither waits for the other. What one lane makes and
the other reads is lent to it, so that its memory is not given away before it was read.
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

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is queued inside goes to this lane."""
        with torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        """What is queued here from now on comes after all that the caller has queued."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def join(self) -> None:
        """What the caller queues from now on comes after all that was queued here."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def swap(self, made_here: Tensor | ScaledRows, made_by_caller: Tensor | ScaledRows) -> None:
        """Each side waits for the other's tensor, and may read it from now on."""
        if self._stream is None:
            return
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        caller.wait_stream(self._stream)
        for tensor in _tensors(made_here):
            tensor.record_stream(caller)
        for tensor in _tensors(made_by_caller):
            tensor.record_stream(self._stream)


INLINE = Lane()


def _tensors(made: Tensor | ScaledRows) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [made.values_BTD, made.scale_BT1]
