"""Every kernel computes what its reference does, at sizes that fit no block and in every dtype of a stream.

Marked for a GPU too: `make test-gpu` compiles the kernels there, where a machine without one only interprets them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference, reference_pictures
from kernels.rows import Modulation, ScaledRows

pytestmark = pytest.mark.gpu

EPS = 1e-6
# Relative error of the whole result: same formula, other order of summation, so a rounding to the dtype may flip. The
# interpreter cuts bfloat16 off where a GPU rounds it, which doubles what a rounding may cost.
ROUNDS = torch.cuda.is_available()
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if ROUNDS else 2**-7, torch.float16: 2**-11}
FLOAT8_BOUND = 1e-2
# (samples, tokens, channels): a single row; fewer channels than a warp has threads; no power of two; the model's own.
SHAPES = [(1, 1, 16), (2, 5, 48), (1, 7, 320), (2, 3, 2048), (1, 3, 4096)]
DTYPES = list(BOUND)
# Distinct rows of a table: all tokens share one, or look theirs up.
NUM_ROWS = [1, 3]

Kernel = Callable[..., Any]


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(20261120)


def kernel(module: str, name: str) -> Kernel:
    return getattr(importlib.import_module(f"kernels.{module}"), name)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_same_rows(got: ScaledRows, expected: ScaledRows) -> None:
    """Scales to a rounding of the dtype; float8 numbers but for the few that fall on another side of a half.

    The interpreter rounds float8 wrongly below a power of two (126 becomes 64): there, most must be near.
    """
    assert got.dtype == expected.dtype and got.values_BTD.dtype == torch.float8_e4m3fn
    # A sum and its norm are rounded one after the other.
    torch.testing.assert_close(got.scale_BT1, expected.scale_BT1, rtol=2 * BOUND[torch.bfloat16], atol=0)
    back, wanted = (rows.values_BTD.float() * rows.scale_BT1 for rows in (got, expected))
    if ROUNDS:
        assert relative_error(back, wanted) <= FLOAT8_BOUND
    else:
        near = (back - wanted).abs() <= 2**-2 * wanted.abs() + 2**-7 * expected.scale_BT1
        assert near.float().mean() >= 0.9


def table(shape: tuple[int, int, int], num_rows: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Shift, scale and gate as the blocks make them: slices of one tensor."""
    samples, _, width = shape
    return list(torch.randn(samples, num_rows, 6, width, device=device).to(dtype)[:, :, :3].unbind(dim=2))


def index_of(shape: tuple[int, int, int], num_rows: int, device: str) -> Tensor | None:
    return None if num_rows == 1 else torch.randint(num_rows, shape[:2], device=device)


def tokens(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Some channels a hundred times the others, as in a trained stream."""
    x = torch.randn(shape, device=device)
    return (x * torch.where(torch.rand(shape[-1], device=device) < 0.05, 100.0, 1.0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulated_rms_norm_is_its_reference(shape, num_rows, dtype, device):
    x, index = tokens(shape, dtype, device), index_of(shape, num_rows, device)
    shift, scale, _ = table(shape, num_rows, dtype, device)
    got = kernel("modulated_rms_norm", "modulated_rms_norm")(x, scale, shift, index, EPS)
    assert relative_error(got, reference.modulated_rms_norm(x, scale, shift, index, EPS)) <= BOUND[dtype]
    assert relative_error(kernel("modulated_rms_norm", "rms_norm")(x, EPS), reference.rms_norm(x, EPS)) <= BOUND[dtype]


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulated_rms_norm_quantised_is_its_reference(shape, num_rows, device):
    x, index = tokens(shape, torch.bfloat16, device), index_of(shape, num_rows, device)
    shift, scale, _ = table(shape, num_rows, torch.bfloat16, device)
    got = kernel("modulated_rms_norm", "modulated_rms_norm_quantised")(x, scale, shift, index, EPS)
    assert_same_rows(got, reference.modulated_rms_norm_quantised(x, scale, shift, index, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_residual_norm_is_its_reference(shape, num_rows, dtype, device):
    x, branch = (tokens(shape, dtype, device) for _ in range(2))
    index = index_of(shape, num_rows, device)
    shift, scale, gate = table(shape, num_rows, dtype, device)
    fused = kernel("gated_residual_norm", "gated_residual_norm")
    gated = kernel("gated_residual_norm", "gated_residual")
    for given in (gate, None):
        at = None if given is None else index
        wanted = reference.gated_residual(x, branch, given, at)
        assert relative_error(gated(x, branch, given, at), wanted) <= BOUND[dtype]
        for modulation in (Modulation(scale, shift, index), None):
            got = fused(x, branch, given, at, modulation, EPS)
            expected = reference.gated_residual_norm(x, branch, given, at, modulation, EPS)
            for ours, theirs in zip(got, expected, strict=True):
                assert relative_error(ours, theirs) <= BOUND[dtype]


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_residual_norm_quantised_is_its_reference(shape, num_rows, device):
    x, branch = (tokens(shape, torch.bfloat16, device) for _ in range(2))
    index = index_of(shape, num_rows, device)
    shift, scale, gate = table(shape, num_rows, torch.bfloat16, device)
    given = (x, branch, gate, index, Modulation(scale, shift, index), EPS)
    got_x, got = kernel("gated_residual_norm", "gated_residual_norm_quantised")(*given)
    expected_x, expected = reference.gated_residual_norm_quantised(*given)
    assert relative_error(got_x, expected_x) <= BOUND[torch.bfloat16]
    assert_same_rows(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["qk_norm_rope", "qk_norm_rope_interleaved"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 16), (3, 10), (2, 64), (32, 64), (32, 128)])
def test_qk_norm_rope_is_its_reference(num_heads, head_dim, name, dtype, device):
    x = tokens((2, 5, num_heads * head_dim), dtype, device)
    weight = torch.randn(num_heads * head_dim, device=device).to(dtype)
    for samples in (1, 2):
        angle = 100 * torch.randn(samples, num_heads, 5, head_dim // 2, device=device)
        for rotary in ((angle.cos(), angle.sin()), None):
            got = kernel("qk_norm_rope", name)(x, weight, rotary, num_heads, EPS)
            expected = getattr(reference, name)(x, weight, rotary, num_heads, EPS)
            assert relative_error(got, expected) <= BOUND[dtype]
            assert got.transpose(1, 2).is_contiguous(), "heads must lie side by side"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["qk_norm_rope_both", "qk_norm_rope_both_interleaved"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 16), (3, 10), (2, 64), (32, 128)])
def test_queries_and_keys_together_are_each_alone(num_heads, head_dim, name, dtype, device):
    q, k = (tokens((2, 5, num_heads * head_dim), dtype, device) for _ in range(2))
    weights = [torch.randn(num_heads * head_dim, device=device).to(dtype) for _ in range(2)]
    for samples in (1, 2):
        angle = 100 * torch.randn(samples, num_heads, 5, head_dim // 2, device=device)
        given = (q, k, *weights, (angle.cos(), angle.sin()), num_heads, EPS)
        both = kernel("qk_norm_rope", name)(*given)
        for got, expected in zip(both, getattr(reference, name)(*given), strict=True):
            assert relative_error(got, expected) <= BOUND[dtype]
            assert got.transpose(1, 2).is_contiguous(), "heads must lie side by side"
        alone = kernel("qk_norm_rope", name.replace("_both", ""))
        for got, x, weight in zip(both, (q, k), weights, strict=True):
            # Not to the bit: the compiler joins other products and sums.
            assert relative_error(got, alone(x, weight, *given[4:])) <= BOUND[dtype]
    with pytest.raises(ValueError, match="keys must be laid out as queries"):
        kernel("qk_norm_rope", name)(q, k[:, :4].contiguous(), *given[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["qk_scale_rope", "qk_scale_rope_interleaved"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 16), (3, 10), (16, 64), (4, 128)])
def test_scale_and_rotation_by_a_given_norm_are_their_reference(num_heads, head_dim, name, dtype, device):
    x = tokens((2, 5, num_heads * head_dim), dtype, device)
    weight = torch.randn(num_heads * head_dim, device=device).to(dtype)
    inverse = torch.rand(2, 5, 1, device=device)
    for samples in (1, 2):
        angle = 100 * torch.randn(samples, num_heads, 5, head_dim // 2, device=device)
        for rotary in ((angle.cos(), angle.sin()), None):
            got = kernel("qk_norm_rope", name)(x, inverse, weight, rotary, num_heads)
            expected = getattr(reference, name)(x, inverse, weight, rotary, num_heads)
            assert relative_error(got, expected) <= BOUND[dtype]
            assert got.transpose(1, 2).is_contiguous(), "heads must lie side by side"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_in_two_halves_is_the_norm_in_one(shape, dtype, device):
    x, weight = tokens(shape, dtype, device), torch.randn(shape[-1], device=device).to(dtype)
    total = kernel("qk_norm_rope", "sum_of_squares")(x)
    assert relative_error(total, reference.sum_of_squares(x)) <= 1e-6
    inverse = torch.rsqrt(total / shape[-1] + EPS)
    got = kernel("qk_norm_rope", "qk_scale_rope")(x, inverse, weight, None, 2)
    assert relative_error(got, kernel("qk_norm_rope", "qk_norm_rope")(x, weight, None, 2, EPS)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves_of_rows_scaled_to_the_peak_of_both_are_the_rows_in_one(shape, dtype, device):
    x = tokens(shape, dtype, device)
    x[0, 0] = 0
    peaks, scaled_to = kernel("quantise_rows", "row_peaks"), kernel("quantise_rows", "quantise_rows_to")
    halves = [half.contiguous() for half in x.chunk(2, dim=-1)]
    assert all(torch.equal(peaks(half), reference.row_peaks(half)) for half in halves)
    joint = torch.maximum(*map(peaks, halves))
    whole_values, whole_scale = kernel("quantise_rows", "quantise_rows")(x)
    values, scales = zip(*(scaled_to(half, joint) for half in halves), strict=True)
    assert all(torch.equal(scale, whole_scale) for scale in scales)
    assert torch.equal(torch.cat(values, dim=-1).view(torch.uint8), whole_values.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 16384)], ids=str)
def test_quantised_rows_are_their_reference(shape, dtype, device):
    x = tokens(shape, dtype, device)
    x[0, 0] = 0
    got = kernel("quantise_rows", "quantise_rows")(x)
    assert_same_rows(ScaledRows(*got, dtype), ScaledRows(*reference.quantise_rows(x), dtype))
    assert_same_rows(kernel("quantise_rows", "gelu_quantised")(x), reference.gelu_quantised(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter makes a number of a float8 NaN; needs a GPU")
@pytest.mark.parametrize("name", ["quantise_rows", "gelu_quantised"])
def test_what_is_no_number_stays_none(name, device):
    x = torch.ones(1, 2, 64, device=device)
    x[0, 1, 7] = float("nan")
    values, scale, *_ = kernel("quantise_rows", name)(x)
    back = values.float() * scale
    assert back[0, 0].isfinite().all() and back[0, 1, 7].isnan()


def test_rows_of_tiny_numbers_and_of_zeros_stay_finite(device):
    x = torch.zeros(1, 3, 64, device=device)
    x[0, 1, 5], x[0, 2, 5] = 1e-38, 1e-20
    values, scale = kernel("quantise_rows", "quantise_rows")(x)
    assert scale[0, :2].flatten().tolist() == [1.0, 1.0]
    # Not quite zero in the interpreter, which makes 0.01 of numbers far below what float8 holds.
    assert values[0, :2].float().abs().max() < 0.1
    assert values[0, 2].float().nonzero().tolist() == [[5]] and values[0, 2, 5].float() == reference.FP8_MAX


def test_what_does_not_lie_row_after_row_is_refused(device):
    x, row = torch.randn(1, 8, 16, device=device).transpose(1, 2), torch.randn(1, 1, 8, device=device)
    refusal = r"x_BTD must be contiguous, got shape \(1, 16, 8\) of strides \(128, 1, 16\)"
    for module, name, arguments in (
        ("modulated_rms_norm", "modulated_rms_norm", (row, row, None, EPS)),
        ("gated_residual_norm", "gated_residual", (x, row, None)),
        ("qk_norm_rope", "qk_norm_rope", (row[0, 0], None, 2, EPS)),
        ("qk_norm_rope", "sum_of_squares", ()),
        ("quantise_rows", "gelu_quantised", ()),
    ):
        with pytest.raises(ValueError, match=refusal):
            kernel(module, name)(x, *arguments)


def test_rows_of_another_width_or_number_are_refused(device):
    x = torch.randn(2, 8, 16, device=device)
    norm = kernel("modulated_rms_norm", "modulated_rms_norm")
    for wrong, rule in (
        ((2, 1, 8), r"rows must be \(1 or 2, N, 16\), got \(2, 1, 8\)"),
        ((3, 1, 16), r"rows must be \(1 or 2, N, 16\), got \(3, 1, 16\)"),
        ((1, 4, 16), r"rows must be one a sample when there is no index, got 4"),
    ):
        rows = torch.randn(wrong, device=device)
        with pytest.raises(ValueError, match=rule):
            norm(x, rows, rows, None, EPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 640])
def test_linear_gelu_is_its_reference(num_tokens, with_bias, dtype):
    x = torch.randn(2, num_tokens, 256, device="cuda").to(dtype)
    weight = (torch.randn(512, 256, device="cuda") / 16).to(dtype)
    bias = torch.randn(512, device="cuda").to(dtype) if with_bias else None
    got = kernel("linear_gelu", "linear_gelu")(x, weight, bias)
    # The reference rounds once more, before the GELU.
    assert relative_error(got, reference.linear_gelu(x, weight, bias)) <= max(BOUND[dtype], 1e-5)


# (frames, height, width): a single sample of U; a row shorter than a block; one longer, which fills no second block.
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10), (2, 4, 290)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rgb_to_yuv420_is_its_reference(device, size, dtype):
    frames, height, width = size
    whole = torch.randn(3, frames, height + 5, width + 3, device=device).to(dtype)
    for video in (whole[:, :, 2 : 2 + height, 1 : 1 + width], whole[..., :height, :width].contiguous()):
        planes, num_wrong = kernel("rgb_to_yuv420", "rgb_to_yuv420")(video)
        expected, _ = reference_pictures.rgb_to_yuv420(video)
        assert planes.shape == expected.shape == (frames, height * 3 // 2, width) and planes.dtype == torch.uint8
        # A compiler may round a product and a sum together, and so come to another side of a half.
        difference = (planes.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-2
        assert num_wrong.item() == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_rgb_to_yuv420_counts_what_is_not_finite_wherever_it_is(device, wrong):
    video = torch.zeros(3, 2, 6, 290, device=device)
    for place in ((0, 0, 0, 0), (1, 1, 5, 289), (2, 0, 3, 256)):
        video[place] = wrong
    assert kernel("rgb_to_yuv420", "rgb_to_yuv420")(video)[1].item() == 3
    assert reference_pictures.rgb_to_yuv420(video)[1].item() == 3
