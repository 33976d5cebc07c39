"""Every byte of a file arrives, whatever the sizes of tensors and buffers are; a file that ends early is refused.

The same code as for a GPU, through memory that is not pinned; `gpu` tests use both. What is begun when is in
`test_reading_ahead.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import CheckpointMismatch
from pipeline.model import checkpoint
from pipeline.model.checkpoint import TensorFile
from pipeline.model.pinned_reader import PinnedReader, Read, byte_offsets
from pipeline.model.share import Region

on_gpu = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on one"),
    ],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Tensors of every size beside a buffer's: none, a number, a few bytes, several buffers, an odd rest."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "large": torch.randn(300, 77, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
        "half": torch.randn(1, 1001, generator=generator).to(torch.bfloat16),
        "bytes": torch.randint(0, 255, (777,), dtype=torch.uint8, generator=generator),
        "layer.weight": torch.randn(64, 48, generator=generator).to(torch.float8_e4m3fn),
        "layer.weight_scale": torch.tensor(0.25),
        "flags": torch.randint(0, 2, (129,), generator=generator).bool(),
        "numbers": torch.randint(-(2**40), 2**40, (33,), generator=generator),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"some": "words"})
    return tmp_path / "a.safetensors"


def same_bits(got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return torch.equal(got.cpu().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("buffer_bytes", [1, 100, 4096, 1 << 20])
@pytest.mark.parametrize(("num_buffers", "num_threads"), [(1, 1), (2, 5), (8, 3)])
def test_every_byte_arrives(path: Path, device: str, buffer_bytes: int, num_buffers: int, num_threads: int) -> None:
    specs, expected = TensorFile(path).tensor_specs(), load_file(path)
    if buffer_bytes == 1:
        del specs["large"]
    reader = PinnedReader(path, device, buffer_bytes=buffer_bytes, num_buffers=num_buffers, num_threads=num_threads)
    reads = [Read(name, spec) for name, spec in specs.items()]
    # Announced or not, and twice each: a buffer may be written over only once it has been emptied.
    for announced in (reads, [], reads, []):
        with reader.reading_ahead(announced):
            got = {name: reader.read(name, spec) for name, spec in specs.items()}
        assert all(same_bits(tensor, expected[name]) for name, tensor in got.items())


def regions_of(shape: tuple[int, ...]) -> list[Region]:
    """Everything, in all its spellings, and parts of every dimension alone and together."""
    whole = [(slice(None),) * num for num in range(len(shape) + 1)] + [tuple(slice(0, size) for size in shape)]
    parts = [slice(size // 3, size // 3 * 2) for size in shape]
    return [
        *whole,
        *((*whole[at], parts[at]) for at in range(len(shape))),
        tuple(parts),
        *([(slice(0, 1),), (slice(-1, None),)] if shape else []),
    ]


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("buffer_bytes", [100, 1 << 20])
@pytest.mark.parametrize("is_announced", [False, True])
def test_every_byte_of_a_region_arrives_in_memory_of_its_own(
    path: Path, device: str, buffer_bytes: int, is_announced: bool
) -> None:
    specs, expected = TensorFile(path).tensor_specs(), load_file(path)
    reader = PinnedReader(path, device, buffer_bytes=buffer_bytes, num_buffers=2, num_threads=2)
    for name, spec in specs.items():
        for region in regions_of(spec.shape):
            with reader.reading_ahead([Read(name, spec, region)] if is_announced else []):
                got = reader.read(name, spec, region)
            assert same_bits(got, expected[name][region].contiguous()), (name, region)
            assert got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes, (name, region)


def test_rows_are_read_without_those_around_them(path: Path) -> None:
    spec, expected = TensorFile(path).tensor_specs()["large"], load_file(path)["large"].clone()
    reader = PinnedReader(path, "cpu", buffer_bytes=512, num_buffers=3, num_threads=2)
    begin, row = byte_offsets(path)["large"], 77 * 4
    with path.open("r+b") as file:
        file.truncate(begin + 200 * row)
    assert same_bits(reader.read("large", spec, (slice(100, 200),)), expected[100:200])
    with pytest.raises(CheckpointMismatch, match=f"large must be {101 * row} bytes from byte {begin + 100 * row} on"):
        reader.read("large", spec, (slice(100, 201), slice(0, 7)))


def test_regions_for_a_gpu_go_through_its_reader(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PinnedReader", lambda path, device: PinnedReader(path, "cpu"))
    file, expected = TensorFile(path), load_file(path)
    for region in ((slice(None), slice(None)), (slice(4, 9),), (slice(None), slice(7, 48))):
        for name in ("large", "layer.weight"):
            assert same_bits(file.read_stored(name, "cuda", region=region), expected[name][region].contiguous())


def test_tensors_are_named_in_the_order_in_which_they_lie(path: Path) -> None:
    begins = byte_offsets(path)
    assert list(begins.values()) == sorted(begins.values()) and list(TensorFile(path).tensor_specs()) == list(begins)
    content, expected = path.read_bytes(), load_file(path)
    for name, begin in begins.items():
        tensor = expected[name].reshape(-1).view(torch.uint8)
        assert content[begin : begin + len(tensor)] == tensor.numpy().tobytes()


def test_a_file_that_was_cut_after_it_was_opened_is_refused_by_the_tensor_that_is_missing(path: Path) -> None:
    specs = TensorFile(path).tensor_specs()
    reader = PinnedReader(path, "cpu", buffer_bytes=512, num_buffers=3, num_threads=2)
    begin = byte_offsets(path)["large"]
    with path.open("r+b") as file:
        file.truncate(begin + 5000)
    for _ in range(3):  # and no buffer is lost on the way
        with pytest.raises(CheckpointMismatch, match=rf"large must be 92400 bytes from byte {begin} on, got a file of"):
            reader.read("large", specs["large"])
    before = [name for name, start in byte_offsets(path).items() if start < begin]
    assert before and all(reader.read(name, specs[name]).shape == specs[name].shape for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on one")
def test_what_is_read_to_a_gpu_is_what_is_read_to_the_host(path: Path) -> None:
    file = TensorFile(path)
    for name in file.tensor_specs():
        for dtype in (None, torch.bfloat16, torch.float32):
            on_device = file.read(name, "cuda", dtype)
            assert on_device.is_cuda and same_bits(on_device, file.read(name, "cpu", dtype))
