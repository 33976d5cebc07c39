"""The kernel that chooses blocks of keys chooses the reference's, in its order."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.ops import fused_ops

pytestmark = pytest.mark.gpu

# (samples, heads, blocks of queries, blocks of keys, seen): one block; all; fewer than a warp's threads; no power of
# two; a full one; more than one warp holds.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 2, 3, 3, 3),
    (2, 3, 5, 20, 7),
    (1, 4, 64, 64, 18),
    (1, 2, 6, 255, 64),
    (1, 1, 2, 1500, 400),
]


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(20261201)


def assert_chosen(promise: torch.Tensor, always: torch.Tensor, num_seen: int) -> torch.Tensor:
    got = fused_ops("cuda").chosen_blocks(promise, always, num_seen)
    assert got.dtype == torch.int32 and torch.equal(got, reference.chosen_blocks(promise, always, num_seen))
    return got


def test_the_operations_of_a_gpu_have_the_kernel(device):
    assert fused_ops("cuda").chosen_blocks.__module__ == "kernels.chosen_blocks"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_choice_is_its_reference(size, device):
    samples, heads, queries, keys, num_seen = size
    promise = 40 * torch.randn(samples, heads, queries, keys, device=device)
    always = torch.rand(queries, keys, device=device) < 0.5 * num_seen / keys
    always &= always.cumsum(dim=1) <= num_seen
    assert_chosen(promise, always, num_seen)


def test_what_is_always_seen_is_seen_however_little_it_promises(device):
    promise = torch.arange(12.0, device=device).repeat(1, 1, 2, 1)
    always = torch.zeros(2, 12, dtype=torch.bool, device=device)
    always[1, :3] = True
    assert assert_chosen(promise, always, 4).tolist() == [[[[8, 9, 10, 11], [0, 1, 2, 11]]]]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-40, float("-inf")])
def test_of_equal_promises_the_first_count(value, device):
    promise = torch.full((1, 1, 3, 40), value, device=device)
    promise[0, 0, 1, 30] = 7.0
    always = torch.zeros(3, 40, dtype=torch.bool, device=device)
    always[2, 20] = True
    got = assert_chosen(promise, always, 3)
    assert got.tolist() == [[[[0, 1, 2], [0, 1, 30], [0, 1, 20]]]]


def test_zeros_of_either_sign_are_equal(device):
    promise = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0], device=device)[None, None, None]
    assert assert_chosen(promise, torch.zeros(1, 5, dtype=torch.bool, device=device), 2).tolist() == [[[[0, 1]]]]


def test_what_does_not_fit_is_refused(device):
    choose, promise = fused_ops("cuda").chosen_blocks, torch.zeros(1, 1, 2, 5, device=device)
    always = torch.zeros(2, 5, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="num_seen must be from 1 to 5, got 6"):
        choose(promise, always, 6)
    with pytest.raises(ValueError, match=r"always_QN must be \(2, 5\), got \(5, 5\)"):
        choose(promise, always.new_zeros(5, 5), 2)
    with pytest.raises(ValueError, match="promise_BHQN must be contiguous"):
        choose(torch.zeros(1, 1, 5, 2, device=device).transpose(2, 3), always, 2)
