"""What ranks exchange arrives where it should, in order of rank; and what is cut fits together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.parallel.collectives import broadcast, gathered, heads_for_tokens, pass_on, tokens_for_heads
from pipeline.parallel.layout import RankGroups, ranks_along
from pipeline.parallel.shards import Shards, padded, part_of
from pipeline.records.parallel import ParallelLayout
from tests.distributed.ranks import Raised, Ranks

# (B, H, T, K): every number once, so that one out of place is seen.
WHOLE = torch.arange(2 * 12 * 8 * 3, dtype=torch.float32).view(2, 12, 8, 3)
SIXES = torch.arange(6 * 3 * 6 * 9).view(6, 3, 6, 9)


def exchange(groups: RankGroups) -> tuple[Tensor, Tensor]:
    axis = groups.sequence.ulysses
    exchanged = heads_for_tokens(WHOLE.chunk(axis.size, dim=2)[axis.index], axis)
    return exchanged, tokens_for_heads(exchanged, axis)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_heads_are_exchanged_for_tokens_and_back(ranks: Ranks, degree: int) -> None:
    layout = ParallelLayout(ulysses=degree).name
    for rank, (exchanged, back) in enumerate(ranks.run(layout, exchange)):
        torch.testing.assert_close(exchanged, WHOLE.chunk(degree, dim=1)[rank], rtol=0, atol=0)
        torch.testing.assert_close(back, WHOLE.chunk(degree, dim=2)[rank], rtol=0, atol=0)


def gather_along_dims(groups: RankGroups) -> list[Tensor]:
    axis = groups.sequence.ring
    return [gathered(SIXES.chunk(axis.size, dim=dim)[axis.index], axis, dim) for dim in range(4)]


def test_parts_are_gathered_along_any_dimension(ranks: Ranks) -> None:
    for answer in ranks.run("ring3", gather_along_dims):
        for got in answer:
            torch.testing.assert_close(got, SIXES, rtol=0, atol=0)


def send_round(groups: RankGroups) -> list[float]:
    ring, x = groups.sequence.ring, torch.full((2, 3), float(groups.world.index))
    seen = []
    for _ in range(ring.size):
        passing = pass_on(x, ring)
        seen.append(float(x[0, 0]))
        x = passing.finish()
    return [*seen, float(x[1, 2])]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_a_tensor_goes_round_the_ring_and_comes_back(ranks: Ranks, degree: int) -> None:
    answers = ranks.run(ParallelLayout(ring=degree).name, send_round)
    assert answers == [[float((rank - hop) % degree) for hop in range(degree + 1)] for rank in range(degree)]


def broadcast_texts(groups: RankGroups) -> list[Tensor | None]:
    mine = [torch.arange(5), None, torch.ones(2, 3, dtype=torch.bfloat16)] if groups.is_leader else None
    return broadcast(mine, groups.world, "cpu")


def test_only_the_leader_needs_to_know_what_it_broadcasts(ranks: Ranks) -> None:
    for numbers, nothing, ones in ranks.run("guidance2_ulysses2", broadcast_texts):
        assert nothing is None
        assert numbers.tolist() == [0, 1, 2, 3, 4]
        assert ones.dtype == torch.bfloat16 and ones.shape == (2, 3) and bool((ones == 1).all())


def places(groups: RankGroups) -> dict[str, tuple[int, ...]]:
    sequence = groups.sequence
    axes = {"tokens": groups.tokens, "ring": sequence.ring, "ulysses": sequence.ulysses, "guidance": groups.guidance}
    return {name: axis.ranks for name, axis in axes.items()} | {"leads": groups.is_leader}


def test_ulysses_ranks_are_neighbours_and_guidance_ranks_far_apart(ranks: Ranks) -> None:
    answers = ranks.run("ring2_ulysses2", places)
    assert answers[2] == {"tokens": (0, 1, 2, 3), "ring": (0, 2), "ulysses": (2, 3), "guidance": (2,), "leads": False}
    assert [answer["leads"] for answer in answers] == [True, False, False, False]
    answers = ranks.run("guidance2_ulysses2", places)
    assert answers[3] == {"tokens": (2, 3), "ring": (3,), "ulysses": (2, 3), "guidance": (1, 3), "leads": False}


def test_tensor_ranks_are_innermost() -> None:
    layout = ParallelLayout(guidance=2, ring=2, ulysses=2, tensor=2)
    assert ranks_along(layout, "tensor")[0] == (0, 1)
    assert ranks_along(layout, "ulysses")[0] == (0, 2)
    assert ranks_along(layout, "ring", "ulysses")[1] == (1, 3, 5, 7)
    assert ranks_along(layout, "guidance")[-1] == (7, 15)


def too_few(groups: RankGroups) -> None:
    raise AssertionError("the world is too small for the layout")


def test_a_world_of_another_size_than_the_layout_is_refused_on_every_rank(ranks: Ranks) -> None:
    for answer in ranks.run("ulysses2", too_few, needs="ulysses4"):
        assert isinstance(answer, Raised)
        assert answer.error == "UsageError" and "layout ulysses4 needs 4 ranks, got 2" in answer.message


@pytest.mark.parametrize("num_tokens", [1, 5, 63, 64])
@pytest.mark.parametrize(("num_rings", "num_ulysses"), [(1, 4), (4, 1), (2, 2), (1, 1), (3, 2)])
def test_parts_hold_every_token_once_and_padding_last(num_tokens: int, num_rings: int, num_ulysses: int) -> None:
    shards = Shards(num_tokens, num_rings, num_ulysses)
    x_BT = torch.arange(1, num_tokens + 1)[None]
    parts = [part_of(x_BT, 1, index, shards.part_len) for index in range(num_rings * num_ulysses)]
    assert {part.shape[1] for part in parts} == {shards.part_len}
    together = torch.cat(parts, dim=1)[0]
    assert together[:num_tokens].tolist() == x_BT[0].tolist() and not together[num_tokens:].any()
    assert shards.has_padding == (len(together) > num_tokens)
    chunks = together.view(num_rings, shards.chunk_len)
    assert [int((chunk > 0).sum()) for chunk in chunks] == [shards.num_in_chunk(ring) for ring in range(num_rings)]


def test_padding_is_zeros_behind() -> None:
    assert padded(torch.ones(2, 3, 4), 1, 5).sum(dim=(0, 2)).tolist() == [8, 8, 8, 0, 0]
