"""Tensors of a safetensors file on their way to a GPU: read by several threads into pinned buffers, copied from there.

One thread reads a file in the page cache slower than a GPU takes it in, and memory that is not pinned is copied twice.
Here threads fill a ring of pinned buffers while the device empties those filled before. Whoever knows what it will read
says so, and is then served from a window of tensors that were begun before it asked; what lies together in the file
shares a buffer, and what is larger than one goes piece by piece. Knows where bytes lie, not what they mean: scales of
float8 weights, the dtypes asked for, which region of a tensor belongs here and what a file must hold are
`checkpoint.py`'s.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import CheckpointMismatch
from pipeline.model.fitting import TensorSpec
from pipeline.model.share import Region

# On one H200, by 16 threads, a file of 6,401 tensors came with 15 GB/s by 8 MiB, with 19 by 16 and 24 by 32; one of
# 1,065 with 21, 29 and 34. But of 32 MiB the ring is a gigabyte, which takes 0.7 s to pin, of 16 MiB 0.26 s
# (tests/bench/results/weights.jsonl).
BUFFER_BYTES = 16 << 20
# One a core, 16 at most. Never less than 8, because a thread that waits for a disk needs no core; by 8 MiB a buffer 8
# were as fast as 16 from the page cache, with larger buffers 8 were not tried.
NUM_THREADS = min(max(os.cpu_count() or 1, 8), 16)
# As many are being emptied as are being filled.
NUM_BUFFERS = 2 * NUM_THREADS


def byte_offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a valid safetensors file begins, in the order of the file.

    The format: eight bytes of the header's length, little-endian; a header in JSON; the numbers, to which the header's
    `data_offsets` count (https://github.com/huggingface/safetensors, "Format").
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    begins = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return dict(sorted(begins.items(), key=lambda item: item[1]))


class Read(NamedTuple):
    """A tensor that somebody wants as it is stored, or a region of it."""

    name: str
    spec: TensorSpec
    region: Region = ()

    def rows(self) -> tuple[int, TensorSpec]:
        """The first byte, counted from the tensor's, and the shape of what is read: of a region all of its rows."""
        if not self.region:
            return 0, self.spec
        first, last, _ = self.region[0].indices(self.spec.shape[0])
        begin = first * math.prod(self.spec.shape[1:]) * self.spec.dtype.itemsize
        return begin, TensorSpec((last - first, *self.spec.shape[1:]), self.spec.dtype)

    def num_bytes(self) -> int:
        """How many bytes are read."""
        _, rows = self.rows()
        return math.prod(rows.shape) * rows.dtype.itemsize


class _Buffer:
    """Bytes on the host, and the moment from which they may be written over."""

    def __init__(self, num_bytes: int, is_pinned: bool) -> None:
        self.bytes_N = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.view: memoryview = self.bytes_N.numpy().data
        # Who waits for it sleeps, and leaves its core to those that read.
        self.emptied = torch.cuda.Event(blocking=True) if is_pinned else None


class _Span:
    """Bytes that lie together in the file and fit into a buffer, and the pieces of tensors that they go to."""

    carried: Future[None]

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.num_bytes = 0
        self.pieces: list[Tensor] = []

    def add(self, piece_N: Tensor) -> None:
        self.pieces.append(piece_N)
        self.num_bytes += len(piece_N)


class _Arrival:
    """A tensor whose bytes are on their way, in the order of the stream that was current when it was begun."""

    def __init__(self, read: Read, tensor_N: Tensor, spans: Sequence[_Span], stream: torch.cuda.Stream | None) -> None:
        self.read = read
        self.num_bytes = len(tensor_N)
        self.spans = spans
        self._tensor_N = tensor_N
        self._stream = stream

    def error(self) -> BaseException | None:
        """What kept a byte from leaving the file, EOFError if it has none there; waits until none is on its way."""
        errors = [span.carried.exception() for span in self.spans]
        return next((error for error in errors if error is not None), None)

    def tensor(self) -> Tensor:
        """What was read, for the current stream."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._tensor_N.device)
            if current != self._stream:
                current.wait_stream(self._stream)
                self._tensor_N.record_stream(current)
        _, rows = self.read.rows()
        tensor = self._tensor_N.view(rows.dtype).view(rows.shape)
        cut = tensor[(slice(None), *self.read.region[1:])] if self.read.region else tensor
        return tensor if cut.shape == tensor.shape else cut.clone(memory_format=torch.contiguous_format)


class PinnedReader:
    """Reads the tensors of one file to one device; any other kind than CUDA gets them through ordinary memory.

    Holds `num_buffers` of `buffer_bytes` as long as it lives, and twice as much on the device while it reads ahead. Not
    thread-safe.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device | str,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        num_buffers: int = NUM_BUFFERS,
        num_threads: int = NUM_THREADS,
    ) -> None:
        self._path = path
        self._device = torch.device(device)
        self._is_pinned = self._device.type == "cuda"
        self._begins = byte_offsets(path)
        self._file = path.open("rb", buffering=0)
        self._buffer_bytes = buffer_bytes
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(num_buffers):
            self._free.put(_Buffer(buffer_bytes, self._is_pinned))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="read")
        # Of this at least half is being read, which is all that the buffers hold.
        self._window_bytes = 2 * num_buffers * buffer_bytes
        self._announced: OrderedDict[str, Read] = OrderedDict()
        self._ahead: dict[str, _Arrival] = {}
        self._ahead_bytes = 0

    @contextmanager
    def reading_ahead(self, reads: Iterable[Read]) -> Iterator[None]:
        """Within, these are begun in this order before they are asked for, a window of them or one larger than that.

        Asked for in another order or in other regions they come later, but are the same. What nobody has asked for by
        the end is dropped, and no thread reads any more.
        """
        try:
            self._announced.update((read.name, read) for read in reads)
            self._fill_window()
            yield
        finally:
            self._announced.clear()
            spans = {span for arrival in self._ahead.values() for span in arrival.spans}
            self._ahead.clear()
            self._ahead_bytes = 0
            wait([span.carried for span in spans if not span.carried.cancel()])

    def read(self, name: str, spec: TensorSpec, region: Region = ()) -> Tensor:
        """The tensor as it is stored, or a region of it, in memory of its own; on a GPU for the current stream.

        Of a region only the rows, which lie together, are read; later dimensions are cut on the device, where the rows
        are whole until this returns. Every byte has left the file by then. CheckpointMismatch if the file ends before
        the last one does.
        """
        wanted = Read(name, spec, region)
        self._fill_window()
        self._announced.pop(name, None)
        arrival = self._ahead.get(name)
        error = None if arrival is None else arrival.error()
        if arrival is not None:
            del self._ahead[name]
            self._ahead_bytes -= arrival.num_bytes
        if arrival is None or arrival.read != wanted or error is not None:
            # What failed may only have shared a buffer with what was at fault: alone, an error is its own.
            arrival = self._read_alone(wanted)
        return arrival.tensor()

    def _read_alone(self, wanted: Read) -> _Arrival:
        (arrival,) = self._begin([wanted])
        error = arrival.error()
        if isinstance(error, EOFError):
            raise CheckpointMismatch(
                f"{self._path}: {wanted.name} must be {wanted.num_bytes()} bytes from byte {self._offset(wanted)} on, "
                f"got a file of {self._path.stat().st_size} bytes; fetch the file again and compare its hash"
            )
        if error is not None:
            raise error
        return arrival

    def _fill_window(self) -> None:
        """Begin what was announced, as far as there is room.

        Not before half of the window is free: begun one by one, small tensors would each take a buffer.
        """
        if self._ahead_bytes > self._window_bytes // 2:
            return
        reads: list[Read] = []
        num_bytes = self._ahead_bytes
        for read in self._announced.values():
            num_bytes += read.num_bytes()
            if num_bytes > self._window_bytes and (self._ahead or reads):
                break
            reads.append(read)
        for read in reads:
            del self._announced[read.name]
        try:
            begun = self._begin(reads)
        except torch.OutOfMemoryError:
            # A window does not fit; one tensor at a time may.
            self._announced.clear()
            return
        for arrival in begun:
            self._ahead[arrival.read.name] = arrival
            self._ahead_bytes += arrival.num_bytes

    def _begin(self, reads: Sequence[Read]) -> list[_Arrival]:
        """Have the threads read these, in this order."""
        stream = torch.cuda.current_stream(self._device) if self._is_pinned else None
        spans: list[_Span] = []
        arrivals = []
        for read in reads:
            tensor_N = torch.empty(read.num_bytes(), dtype=torch.uint8, device=self._device)
            arrivals.append(_Arrival(read, tensor_N, self._spread(tensor_N, self._offset(read), spans), stream))
        for span in spans:
            span.carried = self._threads.submit(self._carry, span, stream)
        return arrivals

    def _offset(self, read: Read) -> int:
        begin, _ = read.rows()
        return self._begins[read.name] + begin

    def _spread(self, tensor_N: Tensor, offset: int, spans: list[_Span]) -> list[_Span]:
        """Add a tensor's bytes, which lie at `offset`, to the last of `spans` and to new ones; gives those it is in."""
        used: list[_Span] = []
        begin = 0
        while begin < len(tensor_N):
            last = spans[-1] if spans else None
            if last is None or last.num_bytes == self._buffer_bytes or last.offset + last.num_bytes != offset + begin:
                last = _Span(offset + begin)
                spans.append(last)
            piece_N = tensor_N[begin : begin + self._buffer_bytes - last.num_bytes]
            last.add(piece_N)
            used.append(last)
            begin += len(piece_N)
        return used

    def _carry(self, span: _Span, stream: torch.cuda.Stream | None) -> None:
        """The bytes of a span to its pieces, by way of a free buffer; EOFError if the file does not have them all."""
        buffer = self._free.get()
        try:
            if buffer.emptied is not None:
                buffer.emptied.synchronize()
            self._fill(buffer.view[: span.num_bytes], span.offset)
            sources = buffer.bytes_N[: span.num_bytes].split([len(piece_N) for piece_N in span.pieces])
            # The caller may be in this mode, and no other thread may write to its tensors then, unless it is too.
            with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
                for piece_N, source_N in zip(span.pieces, sources, strict=True):
                    piece_N.copy_(source_N, non_blocking=True)
            if buffer.emptied is not None:
                buffer.emptied.record(stream)
        finally:
            # Or a tensor would live as long as its neighbour waits to be asked for.
            span.pieces.clear()
            self._free.put(buffer)

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            num_bytes = os.preadv(self._file.fileno(), [target], offset)
            if num_bytes == 0:
                raise EOFError(f"{self._path} ends at byte {offset}")
            target, offset = target[num_bytes:], offset + num_bytes
