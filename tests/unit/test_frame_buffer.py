"""Frames between the decoder's and the encoder's thread: in order, bounded, and nobody waits for nobody."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pipeline.media.frame_buffer import FrameBuffer
from pipeline.records.frames import YuvFrames


def chunk(value: int) -> YuvFrames:
    return YuvFrames(np.full((1, 3, 2), value, np.uint8))


def test_chunks_come_in_order_and_end() -> None:
    buffer = FrameBuffer(1000)
    for value in range(3):
        assert buffer.put(chunk(value), 0)
    buffer.complete()
    assert [int(each.y.flat[0]) for each in buffer.chunks()] == [0, 1, 2]


def test_a_full_buffer_takes_the_next_chunk_once_one_was_read() -> None:
    buffer = FrameBuffer(chunk(0).nbytes)
    assert buffer.put(chunk(0), 0) and not buffer.put(chunk(1), 0)
    reader = buffer.chunks()
    assert next(reader).y.flat[0] == 0
    assert buffer.put(chunk(1), 0)


def test_a_chunk_larger_than_the_bound_passes_alone() -> None:
    buffer = FrameBuffer(1)
    assert buffer.put(chunk(0), 0) and not buffer.put(chunk(1), 0)


def test_an_error_of_the_writer_reaches_the_reader_at_once() -> None:
    buffer = FrameBuffer(1000)
    buffer.put(chunk(0), 0)
    buffer.complete(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        next(buffer.chunks())


@pytest.mark.parametrize("how", ["closed", "never begun"])
def test_a_reader_that_is_gone_frees_the_writer(how: str) -> None:
    buffer = FrameBuffer(1)
    buffer.put(chunk(0), 0)
    waiting = threading.Thread(target=buffer.put, args=(chunk(1), 60.0), daemon=True)
    waiting.start()
    if how == "closed":
        reader = buffer.chunks()
        next(reader)
        reader.close()  # type: ignore[attr-defined] - a generator
    else:
        buffer.abandon()
    waiting.join(5)
    assert not waiting.is_alive() and not buffer.has_reader
