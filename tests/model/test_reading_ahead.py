"""What was announced is begun before it is asked for, a bounded window at a time, and is the same as if it was not.

On a CPU, through memory that is not pinned; reads of the file are watched, held up and made to fail at `os.preadv`.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kernels.ops import reference_ops
from pipeline.errors import CheckpointMismatch
from pipeline.model import checkpoint, pinned_reader
from pipeline.model.checkpoint import CheckpointFile, TensorFile, load_denoiser
from pipeline.model.pinned_reader import PinnedReader, Read, byte_offsets
from pipeline.model.share import Region, Share

NUM_TENSORS, TENSOR_BYTES = 40, 1000
# Four buffers of a tensor each: a window of eight tensors.
RING = {"buffer_bytes": TENSOR_BYTES, "num_buffers": 4, "num_threads": 4}
NUM_IN_WINDOW = 8
DEADLINE_S = 20.0

Preadv = Callable[[int, list[memoryview], int], int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    shape = (10, TENSOR_BYTES // 10)
    tensors = {
        f"t{number:02}": torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
        for number in range(NUM_TENSORS)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def reads(path: Path) -> list[Read]:
    return [Read(name, spec) for name, spec in TensorFile(path).tensor_specs().items()]


@pytest.fixture
def expected(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


class Watch:
    """Stands in for `os.preadv`: notes where each call reads up to, and has `before` say if it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int, int], object] = lambda *_: None) -> None:
        self.ends: list[int] = []
        self.num_running = 0
        self._before = before
        self._lock = threading.Lock()
        self._preadv: Preadv = os.preadv
        monkeypatch.setattr(pinned_reader.os, "preadv", self)

    def __call__(self, file: int, targets: list[memoryview], offset: int) -> int:
        end = offset + len(targets[0])
        with self._lock:
            self.ends.append(end)
            self.num_running += 1
        try:
            self._before(offset, end)
            return self._preadv(file, targets, offset)
        finally:
            with self._lock:
                self.num_running -= 1

    def wait_for(self, num_calls: int) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while len(self.ends) < num_calls:
            assert time.monotonic() < deadline_s, f"{num_calls} reads of the file must begin, got {len(self.ends)}"
            time.sleep(0.001)


def test_several_tensors_are_on_their_way_at_once(path, reads, expected, monkeypatch):
    together = threading.Barrier(RING["num_threads"], timeout=DEADLINE_S)
    met = []

    def meet(offset: int, end: int) -> None:
        if len(watch.ends) <= RING["num_threads"]:
            together.wait()
            met.append(offset)

    watch = Watch(monkeypatch, meet)
    reader = PinnedReader(path, "cpu", **RING)
    with reader.reading_ahead(reads):
        assert all(torch.equal(reader.read(*read), expected[read.name]) for read in reads)
    assert sorted(met) == list(byte_offsets(path).values())[: RING["num_threads"]]
    assert len(watch.ends) == NUM_TENSORS, "each was read once"


def test_a_window_and_no_more_is_begun_ahead_of_what_was_handed_out(path, reads, expected, monkeypatch):
    start, handed_out, leads = min(byte_offsets(path).values()), [], []
    watch = Watch(monkeypatch, lambda _, end: leads.append((end - start) / TENSOR_BYTES - len(handed_out)))
    reader = PinnedReader(path, "cpu", **RING)
    with reader.reading_ahead(reads):
        watch.wait_for(NUM_IN_WINDOW)
        time.sleep(0.05)
        assert len(watch.ends) == NUM_IN_WINDOW, (
            "the window is full before anything is asked for, and no more than full"
        )
        for read in reads:
            handed_out.append(reader.read(*read))
            # And half of it is on its way at any time.
            watch.wait_for(min(len(handed_out) + NUM_IN_WINDOW // 2, NUM_TENSORS))
    assert all(torch.equal(got, expected[read.name]) for got, read in zip(handed_out, reads, strict=True))
    assert max(leads) == NUM_IN_WINDOW


def test_small_neighbours_share_a_buffer(path, reads, expected, monkeypatch):
    watch = Watch(monkeypatch)
    reader = PinnedReader(path, "cpu", buffer_bytes=10 * TENSOR_BYTES, num_buffers=2, num_threads=2)
    with reader.reading_ahead(reads):
        got = [reader.read(*read) for read in reads]
    assert all(torch.equal(tensor, expected[read.name]) for tensor, read in zip(got, reads, strict=True))
    assert all(tensor.untyped_storage().nbytes() == TENSOR_BYTES for tensor in got), "each in memory of its own"
    assert len(watch.ends) == NUM_TENSORS // 10


def test_a_tensor_that_was_handed_out_does_not_live_for_its_neighbours_sake(path, reads):
    reader = PinnedReader(path, "cpu", buffer_bytes=10 * TENSOR_BYTES, num_buffers=2, num_threads=2)
    with reader.reading_ahead(reads):
        handed_out = reader.read(*reads[0])
        memory = StorageWeakRef(handed_out.untyped_storage())
        del handed_out
        assert memory.expired()


@pytest.mark.parametrize("buffer_bytes", [300, TENSOR_BYTES, 10 * TENSOR_BYTES])
def test_any_order_and_any_other_reading_gives_the_same(path, reads, expected, buffer_bytes):
    choose = random.Random(buffer_bytes)
    reader = PinnedReader(path, "cpu", buffer_bytes=buffer_bytes, num_buffers=4, num_threads=3)
    for _ in range(20):
        announced = choose.sample(reads, choose.randrange(len(reads) + 1))
        asked = choose.choices(reads, k=60)  # some twice, some never, some unannounced
        with reader.reading_ahead(announced):
            for name, spec, _ in asked:
                region = choose.choice([(), (), (slice(2, 7),), (slice(None), slice(3, 90))])
                assert torch.equal(reader.read(name, spec, region), expected[name][region])
    assert torch.equal(reader.read(*reads[0]), expected["t00"])


def test_what_is_asked_for_in_another_order_is_not_read_again_in_its_turn(path, reads, expected, monkeypatch):
    watch = Watch(monkeypatch)
    reader = PinnedReader(path, "cpu", **RING)
    with reader.reading_ahead(reads):
        for read in reversed(reads):
            assert torch.equal(reader.read(*read), expected[read.name])
    assert len(watch.ends) == NUM_TENSORS


def test_a_region_is_read_ahead_as_what_was_announced(path, reads, expected, monkeypatch):
    watch = Watch(monkeypatch)
    reader = PinnedReader(path, "cpu", **RING)
    region: Region = (slice(5, 10), slice(0, 50))
    with reader.reading_ahead([read._replace(region=region) for read in reads]):
        for name, spec, _ in reads:
            assert torch.equal(reader.read(name, spec, region), expected[name][region])
    assert len(watch.ends) == NUM_TENSORS and watch.ends[0] == byte_offsets(path)["t00"] + TENSOR_BYTES


@pytest.mark.parametrize("buffer_bytes", [300, TENSOR_BYTES, 10 * TENSOR_BYTES])
def test_an_error_comes_with_its_own_tensor_and_leaves_the_others_alone(
    path, reads, expected, buffer_bytes, monkeypatch
):
    bad = byte_offsets(path)["t05"] + 7

    def fail(offset: int, end: int) -> None:
        if offset <= bad < end:
            raise OSError(errno.EIO, "bad sector")

    watch = Watch(monkeypatch, fail)
    reader = PinnedReader(path, "cpu", buffer_bytes=buffer_bytes, num_buffers=4, num_threads=3)
    with reader.reading_ahead(reads):
        for read in reads:
            if read.name == "t05":
                with pytest.raises(OSError, match="bad sector"):
                    reader.read(*read)
            else:
                assert torch.equal(reader.read(*read), expected[read.name])
    assert watch.num_running == 0


@pytest.mark.parametrize("buffer_bytes", [300, TENSOR_BYTES, 10 * TENSOR_BYTES])
def test_a_file_that_ends_within_the_window_is_refused_by_the_tensor_that_is_cut(path, reads, expected, buffer_bytes):
    reader = PinnedReader(path, "cpu", buffer_bytes=buffer_bytes, num_buffers=4, num_threads=3)
    begin = byte_offsets(path)["t05"]
    with path.open("r+b") as file:
        file.truncate(begin + 7)
    refusal = rf"t05 must be 1000 bytes from byte {begin} on, got a file of"
    with pytest.raises(CheckpointMismatch, match=refusal), reader.reading_ahead(reads):
        for read in reads:
            assert torch.equal(reader.read(*read), expected[read.name])
            assert read.name < "t05"
    assert torch.equal(reader.read(*reads[4]), expected["t04"]), "and no buffer is lost on the way"


def test_nothing_is_read_any_more_once_a_fill_has_ended_early(path, reads, expected, monkeypatch):
    may_go_on = threading.Event()

    def let_go_and_wait(reads_in_progress):
        may_go_on.set()
        return wait(reads_in_progress)

    monkeypatch.setattr(pinned_reader, "wait", let_go_and_wait)
    watch = Watch(monkeypatch, lambda *_: may_go_on.wait(DEADLINE_S))
    reader = PinnedReader(path, "cpu", buffer_bytes=TENSOR_BYTES, num_buffers=4, num_threads=2)
    with pytest.raises(ZeroDivisionError), reader.reading_ahead(reads):
        watch.wait_for(2)
        raise ZeroDivisionError
    assert watch.num_running == 0 and len(watch.ends) == 2, "only what threads had begun is waited for"
    time.sleep(0.1)
    assert torch.equal(reader.read(*reads[-1]), expected[reads[-1].name])
    assert len(watch.ends) == 3, "nor is it for whoever reads next"
    with reader.reading_ahead(reads):
        watch.wait_for(3 + NUM_IN_WINDOW)
        assert all(torch.equal(reader.read(*read), expected[read.name]) for read in reads)


def test_a_window_that_does_not_fit_is_read_one_by_one(path, reads, expected, monkeypatch):
    reader = PinnedReader(path, "cpu", **RING)
    begin = PinnedReader._begin

    def begin_one(self, wanted):
        if len(wanted) > 1:
            raise torch.OutOfMemoryError("too much")
        return begin(self, wanted)

    monkeypatch.setattr(PinnedReader, "_begin", begin_one)
    with reader.reading_ahead(reads):
        for read in reads:
            assert torch.equal(reader.read(*read), expected[read.name])


class FirstHalf:
    """A share of every matrix, by its rows; computes nothing with it."""

    def fit(self, denoiser, ops):
        pass

    def region(self, place, shape):
        return (Share(0, 2).of(shape[0]),) if len(shape) == 2 and shape[0] % 2 == 0 else ()


@pytest.mark.parametrize("folder", ["dit_ltx2_0", "dit_ltx2_0_fp8"])
@pytest.mark.parametrize("fp8_blocks", [(), (0, 1)])
@pytest.mark.parametrize("sharding", [None, FirstHalf()])
def test_a_module_is_filled_by_reading_each_byte_once(folder, fp8_blocks, sharding, fixtures, monkeypatch):
    def to_the_host(path: Path, device: str) -> PinnedReader:
        return PinnedReader(path, "cpu", buffer_bytes=1 << 16, num_buffers=3, num_threads=2)

    monkeypatch.setattr(checkpoint, "PinnedReader", to_the_host)
    path = fixtures / folder / "model.safetensors"
    settings = {"fp8_blocks": fp8_blocks, "sharding": sharding}
    expected = load_denoiser(CheckpointFile(path), reference_ops(), "cpu", **settings)
    ranges = []
    Watch(monkeypatch, lambda offset, end: ranges.append((offset, end)))
    filled = load_denoiser(CheckpointFile(path), reference_ops(), "cuda", **settings)
    for (name, got), (_, wanted) in zip(_tensors(filled), _tensors(expected), strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        assert torch.equal(got.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name
    ranges.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert sharding is not None or len(ranges) < len(byte_offsets(path)), (
        "neighbours share buffers, so they are read ahead"
    )


def _tensors(module):
    return [*module.named_parameters(), *((name, tensor) for name, tensor in module.named_buffers())]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on one")
def test_what_was_begun_for_one_stream_is_there_for_another(path, reads, expected):
    reader = PinnedReader(path, "cuda", **RING)
    other = torch.cuda.Stream()
    for _ in range(20):
        with reader.reading_ahead(reads):
            for read in reads:
                with torch.cuda.stream(other):
                    seen = reader.read(*read).clone()
                other.synchronize()
                assert torch.equal(seen.cpu(), expected[read.name])
