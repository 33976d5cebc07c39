"""Attention over parts of the keys, merged, is attention over all of them; and when whose slot is used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.reference import attention, attention_with_lse
from pipeline.parallel.attention import Merged
from pipeline.parallel.collectives import gathered
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.sequence import SequenceParallelDenoiser
from tests.distributed.equality import assert_equal_up_to_rounding
from tests.distributed.ranks import Call, Ranks, loaded


@pytest.fixture
def q_k_v() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    # Scores of this size make a softmax in which single keys count.
    return tuple(3 * torch.randn(2, 3, num, 8, generator=draw) for num in (7, 20, 20))


@pytest.fixture
def bias() -> Tensor:
    bias = torch.randn(2, 1, 7, 20, generator=torch.Generator().manual_seed(2))
    return bias.masked_fill(bias > 0.7, torch.finfo(torch.float32).min)


def test_log_sum_exp_is_that_of_the_scores(q_k_v: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> None:
    q, k, v = q_k_v
    mixed, lse = attention_with_lse(q, k, v, bias)
    torch.testing.assert_close(mixed, attention(q, k, v, bias))
    scores = torch.einsum("bhtk,bhsk->bhts", q.double(), k.double()) / 8**0.5 + bias
    torch.testing.assert_close(lse.double(), scores.exp().sum(dim=-1).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [[20], [1, 19], [7, 6, 7], [12, 8]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_parts_of_the_keys_add_up_to_all(
    cuts: list[int], with_bias: bool, q_k_v: tuple[Tensor, Tensor, Tensor], bias: Tensor
) -> None:
    q, k, v = q_k_v
    merged, start = Merged(q), 0
    for cut in cuts:
        keys = slice(start, start + cut)
        merged.add(*attention_with_lse(q, k[:, :, keys], v[:, :, keys], bias[..., keys] if with_bias else None))
        start += cut
    torch.testing.assert_close(merged.mixed_BHTK, attention(q, k, v, bias if with_bias else None))


def test_parts_in_bfloat16_are_merged_in_float32(q_k_v: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = (x.bfloat16() for x in q_k_v)
    merged = Merged(q)
    for keys in (slice(0, 9), slice(9, 20)):
        merged.add(*attention_with_lse(q, k[:, :, keys], v[:, :, keys], None))
    assert merged.mixed_BHTK.dtype == merged.lse_BHT.dtype == torch.float32
    torch.testing.assert_close(
        merged.mixed_BHTK, attention(q.float(), k.float(), v.float(), None), rtol=0.02, atol=0.02
    )


class GatheringAttention:
    """Spread attention of another make: everybody gathers all keys."""

    def __init__(self, groups: RankGroups) -> None:
        self.num_calls = 0
        self._axis = groups.tokens

    def __call__(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> Tensor:
        self.num_calls += 1
        return attention(q_BHTK, gathered(k_BHSK, self._axis, 2), gathered(v_BHSK, self._axis, 2), None)


def with_another_exchange(groups: RankGroups, call: Call) -> tuple[tuple[Tensor | None, Tensor | None], int]:
    even = GatheringAttention(groups)
    denoiser = SequenceParallelDenoiser(copy.deepcopy(loaded(call.model)), groups, attention_with_lse, even)
    return call.velocities(denoiser), even.num_calls


@pytest.mark.parametrize(
    ("name", "num_tokens", "num_calls"),
    [("dit_ltx2_0/case_t2v", 60, 2), ("dit_ltx2_0/case_t2v", 59, 0), ("dit_ltx2_0/case_masked", 60, 0)],
)
def test_another_exchange_has_the_calls_without_padding_and_masks(
    name: str, num_tokens: int, num_calls: int, ranks: Ranks, call: Callable[..., Call]
) -> None:
    given = call(name, num_tokens)
    for velocities, counted in ranks.run("ring2_ulysses2", with_another_exchange, given):
        assert_equal_up_to_rounding(velocities, given.velocities(loaded(given.model)))
        assert counted == num_calls
