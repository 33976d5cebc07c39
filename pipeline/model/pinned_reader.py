"""Tensors of a safetensors file on their way to a GPU: read by several threads into pinned buffers, copied from there.

One thread reads a file in the page cache slower than a GPU takes it in, and memory that is not pinned is copied twice.
Here threads fill a ring of pinned buffers while the device empties those filled before; a tensor larger than a buffer
goes piece by piece, in the order of the file. Knows where bytes lie, not what they mean: scales of float8 weights, the
dtypes asked for, which region of a tensor belongs here and what a file must hold are `checkpoint.py`'s.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from pipeline.errors import CheckpointMismatch
from pipeline.model.fitting import TensorSpec
from pipeline.model.share import Region

# Of 8 MiB a thread reads for 2 ms, against which handing it out costs nothing.
BUFFER_BYTES = 8 << 20
# Twice the threads: as many are being emptied as are being filled.
NUM_BUFFERS = 16
NUM_THREADS = 8


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


class _Buffer:
    """Bytes on the host, and the moment from which they may be written over."""

    def __init__(self, num_bytes: int, is_pinned: bool) -> None:
        self.bytes_N = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.emptied = torch.cuda.Event() if is_pinned else None


class PinnedReader:
    """Reads the tensors of one file to one device; any other kind than CUDA gets them through ordinary memory.

    Holds `num_buffers` of `buffer_bytes` as long as it lives. Not thread-safe.
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

    def read(self, name: str, spec: TensorSpec, region: Region = ()) -> Tensor:
        """The tensor as it is stored, or a region of it, in memory of its own; on a GPU for the current stream.

        Of a region only the rows, which lie together, are read; later dimensions are cut on the device, where the rows
        are whole until this returns. Every byte has left the file by then. CheckpointMismatch if the file ends before
        the last one does.
        """
        if not region:
            return self._read_bytes(name, 0, spec)
        first, last, _ = region[0].indices(spec.shape[0])
        rows = TensorSpec((last - first, *spec.shape[1:]), spec.dtype)
        tensor = self._read_bytes(name, first * math.prod(spec.shape[1:]) * spec.dtype.itemsize, rows)
        cut = tensor[(slice(None), *region[1:])]
        return tensor if cut.shape == tensor.shape else cut.clone(memory_format=torch.contiguous_format)

    def _read_bytes(self, name: str, begin: int, spec: TensorSpec) -> Tensor:
        """What `spec` says, from byte `begin` of the tensor on."""
        num_bytes, offset = math.prod(spec.shape) * spec.dtype.itemsize, self._begins[name] + begin
        tensor_N = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._is_pinned else None
        pieces = list(self._pieces(tensor_N, offset))
        if len(pieces) == 1:
            # Most tensors of a model are smaller than a buffer.
            whole = self._copy(*pieces[0], stream)
        else:
            reads = [self._threads.submit(self._copy, piece_N, offset, stream) for piece_N, offset in pieces]
            wait(reads)
            whole = all([read.result() for read in reads])
        if not whole:
            raise CheckpointMismatch(
                f"{self._path}: {name} must be {num_bytes} bytes from byte {offset} on, got a file of "
                f"{self._path.stat().st_size} bytes; fetch the file again and compare its hash"
            )
        return tensor_N.view(spec.dtype).view(spec.shape)

    def _pieces(self, tensor_N: Tensor, offset: int) -> Iterator[tuple[Tensor, int]]:
        for begin in range(0, len(tensor_N), self._buffer_bytes):
            yield tensor_N[begin : begin + self._buffer_bytes], offset + begin

    def _copy(self, piece_N: Tensor, offset: int, stream: torch.cuda.Stream | None) -> bool:
        """Bytes from `offset` on to `piece_N`, by way of a free buffer; says if the file had them all."""
        buffer = self._free.get()
        try:
            if buffer.emptied is not None:
                buffer.emptied.synchronize()
            source_N = buffer.bytes_N[: len(piece_N)]
            if not self._fill(source_N.numpy().data, offset):
                return False
            # The caller may be in this mode, and no other thread may write to its tensors then, unless it is too.
            with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
                piece_N.copy_(source_N, non_blocking=True)
            if buffer.emptied is not None:
                buffer.emptied.record(stream)
            return True
        finally:
            self._free.put(buffer)

    def _fill(self, target: memoryview, offset: int) -> bool:
        while target:
            num_bytes = os.preadv(self._file.fileno(), [target], offset)
            if num_bytes == 0:
                return False
            target, offset = target[num_bytes:], offset + num_bytes
        return True
