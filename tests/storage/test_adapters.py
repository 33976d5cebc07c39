"""Adapter files: judged by their headers before anything is built, hashed once, fetched once."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

import pipeline.storage.adapters
from pipeline.errors import StorageUnavailable, UsageError
from pipeline.storage.adapters import AdapterShelf, Stored, header_of, local_adapter, misfits
from pipeline.storage.filesystem import sha256_of

CONNECTOR = "diffusion_model.video_embeddings_connector.blocks.0.to_q"
WEIGHTS = {"model.diffusion_model.blocks.0.to_q.weight": (8, 4), f"model.{CONNECTOR}.weight": (8, 4),
           "vae.conv.weight": (3, 3)}  # fmt: skip
FITTING = {"diffusion_model.blocks.0.to_q.lora_A.weight": (2, 4), "diffusion_model.blocks.0.to_q.lora_B.weight": (8, 2)}


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """A safetensors file of zeros, by its public layout: header length, JSON header, data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return str(path)


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    return {name: Stored(shape, "F32") for name, shape in shapes.items()}


@pytest.fixture
def shelf(tmp_path: Path) -> AdapterShelf:
    return AdapterShelf(write(tmp_path / "model.safetensors", WEIGHTS))


def test_an_adapter_that_fits_is_known_by_the_hash_of_its_bytes(shelf: AdapterShelf, tmp_path: Path) -> None:
    uri = write(tmp_path / "a.safetensors", FITTING)
    assert shelf.sha256(uri) == hashlib.sha256(Path(uri).read_bytes()).hexdigest()
    Path(uri).unlink()
    assert shelf.sha256(uri)  # looked at once a job


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "it holds no tensors"),
        (
            {"lora_unet_to_q.lora_down.weight": (2, 4)},
            "is not a key of the form diffusion_model.<module>.lora_A.weight",
        ),
        ({"diffusion_model.blocks.0.to_q.lora_A.weight": (2, 4)}, "must have lora_A (rank, in) and lora_B (out, rank)"),
        ({name.replace("to_q", "to_x"): shape for name, shape in FITTING.items()}, "denoiser has no blocks.0.to_x"),
        (
            {f"{CONNECTOR}.lora_A.weight": (2, 4), f"{CONNECTOR}.lora_B.weight": (8, 2)},
            "the model's denoiser has no video_embeddings_connector.blocks.0.to_q",
        ),
        ({**FITTING, "diffusion_model.blocks.0.to_q.lora_B.weight": (16, 2)}, "is [8, 4] in the model, [16, 4] in the"),
    ],
)
def test_an_adapter_that_does_not_fit_says_why(
    shelf: AdapterShelf, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    uri = write(tmp_path / "a.safetensors", shapes)
    with pytest.raises(UsageError) as caught:
        shelf.sha256(uri)
    assert message in str(caught.value) and "use an adapter that was trained for this model" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 something else", struct.pack("<Q", 1 << 60), b"\x02" + bytes(7) + b"[]"]
)
def test_a_file_of_another_kind_is_refused(shelf: AdapterShelf, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="it is not a safetensors file"):
        shelf.sha256(str(tmp_path / "a.safetensors"))
    with pytest.raises(UsageError, match="must be readable"):
        shelf.sha256(str(tmp_path / "absent.safetensors"))


def test_without_the_checkpoint_at_hand_only_the_form_is_judged(tmp_path: Path) -> None:
    shelf = AdapterShelf(str(tmp_path / "on-the-workers-only.safetensors"))
    assert shelf.sha256(write(tmp_path / "a.safetensors", FITTING))
    assert misfits(stored({name.replace("to_q", "to_x"): shape for name, shape in FITTING.items()}), None) == []


def test_an_adapter_that_is_cut_short_or_of_whole_numbers_is_refused(shelf: AdapterShelf, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.safetensors", FITTING))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        UsageError, match=f"must have the {len(whole)} bytes that its header names, got {len(whole) - 1}"
    ):
        shelf.sha256(str(path))
    other = tmp_path / "b.safetensors"
    other.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    with pytest.raises(UsageError, match=r"lora_A.weight must be of a float kind \(F64, .*\), got I32"):
        shelf.sha256(str(other))


@pytest.mark.parametrize("good_reads", [0, 2], ids=["header", "hash"])
@pytest.mark.parametrize("error", [OSError("reset by peer"), RuntimeError("a client's own class")])
def test_a_read_that_breaks_off_is_our_storage_error(
    shelf: AdapterShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_reads: int, error: Exception
) -> None:
    uri = write(tmp_path / "a.safetensors", FITTING)
    shelf._checkpoint_weights()
    reads = 0

    @contextmanager
    def breaking(uri: str) -> Iterator[Any]:
        def read(count: int) -> bytes:
            nonlocal reads
            reads += 1
            if reads > good_reads:
                raise error
            return stream.read(count)

        with Path(uri).open("rb") as stream:
            yield SimpleNamespace(read=read)

    monkeypatch.setattr(pipeline.storage.adapters, "open_for_reading", breaking)
    for _ in range(2):  # the second time it is known
        with pytest.raises(StorageUnavailable, match=f"while reading {uri}: {error}"):
            shelf.sha256(uri)
    assert reads == good_reads + 1


def test_an_adapter_in_a_bucket_is_fetched_once_and_checked_by_hash(bucket: str, tmp_path: Path) -> None:
    content = Path(write(tmp_path / "a.safetensors", FITTING)).read_bytes()
    uri, cache = f"{bucket}/a.safetensors", tmp_path / "cache"
    with fsspec.open(uri, "wb") as target:
        target.write(content)
    assert header_of(uri) == stored(FITTING)
    copy = local_adapter(uri, hashlib.sha256(content).hexdigest(), cache)
    assert copy.read_bytes() == content
    fsspec.filesystem("s3").rm(uri)
    assert local_adapter(uri, hashlib.sha256(content).hexdigest(), cache) == copy
    with fsspec.open(uri, "wb") as target:
        target.write(b"another")
    with pytest.raises(UsageError, match="must be the file that was planned with"):
        local_adapter(uri, "0" * 64, cache)
    assert [path.name for path in (cache / "adapters").iterdir()] == [copy.name]


def test_a_local_adapter_is_hashed_once_a_process_and_refused_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write(tmp_path / "a.safetensors", FITTING))
    planned = hashlib.sha256(path.read_bytes()).hexdigest()
    hashed = []
    monkeypatch.setattr(pipeline.storage.adapters, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    assert [local_adapter(str(path), planned, tmp_path) for _ in range(3)] == [path] * 3
    assert hashed == [path]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(1, 1))  # as if time had passed, whatever the clock's grain
    with pytest.raises(UsageError, match=r"must be the file that was planned with, got another; run the same"):
        local_adapter(str(path), planned, tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match="must be the file that was planned with, got none"):
        local_adapter(str(path), planned, tmp_path)
