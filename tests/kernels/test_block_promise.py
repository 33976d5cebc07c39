"""What blocks of keys promise, by the kernel: the reference's numbers, and no key that is not there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.ops import BLOCK_TOKENS, fused_ops

# Of a block past the end that a program has beside its last one, NumPy warns where a GPU goes on; nothing is stored.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]

# Of the largest promise: the reference rounds every product to the dtype, and means may be rounded to another side. The
# interpreter cuts bfloat16 off where a GPU rounds it.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8 if torch.cuda.is_available() else 2**-7, torch.float16: 2**-11}
# (samples, heads, queries, keys, channels): less than a block; whole blocks, as many as a program takes and one more;
# short last blocks of one token and of more; more blocks of queries than a tile, which fill no second one.
SHAPES = [
    (1, 1, 1, 1, 64),
    (1, 5, 40, 100, 96),
    (2, 1, 256, 384, 128),
    (2, 5, 300, 257, 64),
    (1, 5, 130, 500, 96),
    (2, 5, 129, 200, 128),
    (1, 1, 65 * BLOCK_TOKENS + 3, 300, 64),
]


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(20261204)


def fused(q_BHTK: Tensor, k_BHSK: Tensor) -> Tensor:
    return fused_ops("cuda").block_promise(q_BHTK, k_BHSK)


def token_by_token(samples: int, tokens: int, heads: int, channels: int, device: str) -> Tensor:
    """(B, H, T, K) as attention gets it. Tokens of a head have something in common, which their mean keeps."""
    common = torch.randn(samples, 1, heads, channels, device=device)
    return (torch.randn(samples, tokens, heads, channels, device=device) + 2 * common).transpose(1, 2)


def test_the_operations_of_a_gpu_have_the_kernel(device):
    assert fused_ops("cuda").block_promise.__module__ == "kernels.block_promise"


def assert_same(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND[dtype] * expected.abs().max().item())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_promise_is_its_reference(shape, dtype, device):
    samples, heads, num_queries, num_keys, channels = shape
    q = token_by_token(samples, num_queries, heads, channels, device).to(dtype)
    k = token_by_token(samples, num_keys, heads, channels, device).to(dtype)
    assert not q.is_contiguous() or 1 in (heads, num_queries)
    got = fused(q, k)
    assert got.isfinite().all() and got.is_contiguous()
    assert_same(got, reference.block_promise(q, k), dtype)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_promise_is_that_of_the_same_numbers_however_they_lie(dtype, device):
    q, k = (token_by_token(2, tokens, 3, 96, device).to(dtype) for tokens in (300, 200))
    expected = fused(q, k)
    for layout in (
        lambda x: x.contiguous(),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], dim=3)[..., 96:],
        lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    ):
        assert_same(fused(layout(q), layout(k)), expected, dtype)


@pytest.mark.parametrize("num_keys", [1, 127, 129, 300])
def test_keys_that_are_missing_count_nothing(num_keys, device):
    """Keys that would be zeros beside these: exp(0) is far more than all that is there, exp(-50) each."""
    q = torch.full((1, 1, BLOCK_TOKENS, 64), 5.0, device=device)
    k = torch.full((1, 1, num_keys, 64), -1.25, device=device)
    counts = [min(BLOCK_TOKENS, num_keys - first) for first in range(0, num_keys, BLOCK_TOKENS)]
    expected = torch.tensor([math.log(count) - 50 for count in counts], device=device)
    for promise in (fused, reference.block_promise):
        torch.testing.assert_close(promise(q, k)[0, 0, 0], expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("num_queries", [1, 127, 129, 300])
def test_the_mean_of_a_short_block_is_over_the_queries_that_it_has(num_queries, device):
    q = torch.full((1, 1, num_queries, 64), 5.0, device=device)
    k = torch.full((1, 1, 1, 64), 1.25, device=device)
    for promise in (fused, reference.block_promise):
        got = promise(q, k)
        torch.testing.assert_close(got, torch.full_like(got, 50.0), rtol=1e-6, atol=1e-4)


def test_memory_beyond_the_tensors_is_not_looked_at(device):
    whole = torch.full((1, 4 * BLOCK_TOKENS, 3, 64), torch.nan, device=device)
    whole[:, 10:310, 1] = torch.randn(1, 300, 64, device=device)
    x = whole[:, 10:310, 1:2].transpose(1, 2)
    got = fused(x, x)
    assert got.isfinite().all()
    assert_same(got, reference.block_promise(x, x), torch.float32)


def test_logits_that_no_exponential_holds_stay_finite(device):
    q, k = (torch.randn(1, 2, 200, 64, device=device) + 100 for _ in range(2))
    for given in (k, -k):
        got = fused(q, given)
        assert got.isfinite().all() and got.abs().min() > 1000
        assert_same(got, reference.block_promise(q, given), torch.float32)
