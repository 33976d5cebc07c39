"""The decoder's kernels compute what their reference does: parts in a margin, normed on the way; sums with a bias.

Marked for a GPU too: `make test-gpu` compiles the kernels there, where a machine without one only interprets them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference_pictures

pytestmark = pytest.mark.gpu

EPS = 1e-8
# As in test_triton_kernels.py: a rounding may flip, and the interpreter cuts bfloat16 off where a GPU rounds it.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if torch.cuda.is_available() else 2**-7, torch.float16: 2**-11}
DTYPES = list(BOUND)
MARGINS = [(1, 1), (0, 0), (1, 0), (2, 3)]
# Samples, channels, height and width; frames of each part. Channels of the published decoder; ones that fill no power
# of two; rows that fill no program, and rows of several; sides that a margin of 3 can just be reflected of.
CASES = [
    ((1, 128, 3, 37), (2, 1)),
    ((2, 48, 4, 7), (1, 1, 1)),
    ((1, 512, 3, 9), (2,)),
    ((2, 5, 7, 4), (2,)),
    ((1, 1024, 3, 5), (1, 1)),
    ((1, 5, 3, 1100), (1,)),
]


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(20261120)


def kernel(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"kernels.{module}"), name)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def numbers(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    x = torch.randn(size, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if len(size) == 5 else x


def parts_of(size: tuple[int, int, int, int], frames: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Each some frames of a longer tensor, as a window holds them; the last is a whole one."""
    samples, channels, height, width = size
    last = len(frames) - 1
    wholes = [
        numbers((samples, channels, n + 2 * (i < last), height, width), dtype, device) for i, n in enumerate(frames)
    ]
    return [
        whole[:, :, 1 : 1 + n] if i < last else whole for i, (whole, n) in enumerate(zip(wholes, frames, strict=True))
    ]


def modulation_of(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Slices of one tensor, as the decoder makes them."""
    scale, shift = numbers((size[0], 2, size[1], 1, 1, 1), dtype, device).unbind(1)
    return scale, shift


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reflects", [True, False])
@pytest.mark.parametrize(("size", "frames"), CASES, ids=str)
def test_framed_norm_silu_is_its_reference(device, size, frames, reflects, dtype):
    parts, ours = parts_of(size, frames, dtype, device), kernel("framed_norm_silu", "framed_norm_silu")
    bias, modulation = numbers(size[1:2], dtype, device), modulation_of(size, dtype, device)
    # The decoder's margin with all and with nothing; others with either.
    for margin, *given in (
        ((1, 1), bias, modulation),
        ((1, 1), None, None),
        ((1, 0), bias, None),
        ((2, 3), None, modulation),
    ):
        if reflects and (margin[0] >= size[2] or margin[1] >= size[3]):
            continue
        got = ours(parts, *given, EPS, margin, reflects)
        expected = reference_pictures.framed_norm_silu(parts, *given, EPS, margin, reflects)
        assert got.is_contiguous(memory_format=torch.channels_last_3d)
        assert relative_error(got, expected) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reflects", [True, False])
@pytest.mark.parametrize(("size", "frames"), CASES, ids=str)
def test_framed_is_its_reference_to_the_bit(device, size, frames, reflects, dtype):
    parts = parts_of(size, frames, dtype, device)
    for margin in MARGINS:
        if not reflects or (margin[0] < size[2] and margin[1] < size[3]):
            got = kernel("framed_norm_silu", "framed")(parts, margin, reflects)
            assert got.is_contiguous(memory_format=torch.channels_last_3d)
            assert torch.equal(got, reference_pictures.framed(parts, margin, reflects))


@pytest.mark.parametrize("reflects", [True, False])
def test_a_margin_is_that_of_the_librarys_convolutions(reflects):
    x = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    conv = torch.nn.Conv3d(3, 7, (1, 3, 5), padding=(0, 1, 2), padding_mode="reflect" if reflects else "zeros")
    framed = reference_pictures.framed(x.split(2, dim=2), (1, 2), reflects)
    torch.testing.assert_close(functional.conv3d(framed, conv.weight, conv.bias), conv(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "frames"), CASES, ids=str)
def test_add_with_bias_is_its_reference_in_place(device, size, frames, dtype):
    parts, bias = parts_of(size, frames, dtype, device), numbers(size[1:2], dtype, device)
    x = numbers((*size[:2], sum(frames), *size[2:]), dtype, device)
    for given in (parts, []):
        ours, theirs = x.clone(), x.clone()
        got = kernel("add_with_bias", "add_with_bias_")(ours, bias, given)
        assert got.data_ptr() == ours.data_ptr()
        expected = reference_pictures.add_with_bias_(theirs, bias, given)
        assert expected.data_ptr() == theirs.data_ptr()
        assert relative_error(got, expected) <= BOUND[dtype]


def test_add_with_bias_of_some_frames_leaves_the_others(device):
    x, bias = numbers((2, 5, 4, 3, 3), torch.float32, device), numbers((5,), torch.float32, device)
    before = x.clone()
    kernel("add_with_bias", "add_with_bias_")(x[:, :, 1:3], bias, [])
    torch.testing.assert_close(x[:, :, 1:3], before[:, :, 1:3] + bias[:, None, None, None])
    assert torch.equal(x[:, :, [0, 3]], before[:, :, [0, 3]])


def test_channels_that_do_not_lie_last_are_refused(device):
    x, bias = torch.randn(1, 16, 2, 3, 4, device=device), torch.randn(16, device=device)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    for call in (
        lambda: kernel("framed_norm_silu", "framed_norm_silu")([last, x], bias, None, EPS, (1, 1), True),
        lambda: kernel("framed_norm_silu", "framed")([last[..., :2]], (1, 1), True),
        lambda: kernel("add_with_bias", "add_with_bias_")(x, bias, [last]),
        lambda: kernel("add_with_bias", "add_with_bias_")(last, bias, [x]),
    ):
        with pytest.raises(ValueError, match=r"must be torch\.channels_last_3d, got shape"):
            call()


def test_a_margin_as_wide_as_what_it_reflects_is_refused(device):
    x = numbers((1, 16, 1, 2, 4), torch.float32, device)
    with pytest.raises(ValueError, match=r"margin must be less than the sides \(2, 4\) that it reflects, got \(2, 1\)"):
        kernel("framed_norm_silu", "framed")([x], (2, 1), True)
