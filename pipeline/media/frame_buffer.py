"""Decoded frames between the thread that decodes and the thread that encodes: bounded by bytes, first in, first out.

A device decodes a clip several times faster than x264 encodes it. The buffer holds the difference, so that the device
can go on with the next clip; when it is full the device waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from pipeline.records.frames import YuvFrames


class FrameBuffer:
    """A queue of chunks of at most `max_bytes` in all, and never less than one chunk."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._chunks: deque[YuvFrames] = deque()
        self._held_bytes = 0
        self._change = threading.Condition()
        self._is_complete = False
        self._error: BaseException | None = None
        self._has_reader = True

    def put(self, chunk: YuvFrames, timeout_s: float) -> bool:
        """Add a chunk, waiting for room for at most `timeout_s`; says if it was added. It vanishes if nobody reads."""
        with self._change:
            if not self._change.wait_for(lambda: not self._has_reader or self._has_room(chunk), timeout_s):
                return False
            if self._has_reader:
                self._chunks.append(chunk)
                self._held_bytes += chunk.nbytes
                self._change.notify_all()
            return True

    @property
    def has_reader(self) -> bool:
        """False once nobody reads any more, or ever will."""
        return self._has_reader

    def abandon(self) -> None:
        """Nobody will read: what is held, and whatever still comes, vanishes."""
        with self._change:
            self._has_reader = False
            self._chunks.clear()
            self._change.notify_all()

    def complete(self, error: BaseException | None = None) -> None:
        """No more chunks come; with `error` the reader gets it in their place."""
        with self._change:
            if not self._is_complete:
                self._is_complete, self._error = True, error
                self._change.notify_all()

    def chunks(self) -> Iterator[YuvFrames]:
        """The chunks in order. Raises the error that `complete` was given. Closed early, it frees the writer."""
        try:
            while (chunk := self._next()) is not None:
                yield chunk
                del chunk
        finally:
            self.abandon()

    def _has_room(self, chunk: YuvFrames) -> bool:
        return not self._chunks or self._held_bytes + chunk.nbytes <= self._max_bytes

    def _next(self) -> YuvFrames | None:
        with self._change:
            self._change.wait_for(lambda: self._chunks or self._is_complete)
            if self._error is not None:
                raise self._error
            if not self._chunks:
                return None
            chunk = self._chunks.popleft()
            self._held_bytes -= chunk.nbytes
            self._change.notify_all()
            return chunk
