"""Ranks agree on the lowest vote, over gloo, whatever their devices are busy with."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel.consent import GangConsent
from pipeline.parallel.layout import RankGroups
from tests.distributed.ranks import Ranks, require_gpus

# By item, then by rank.
VOTES = [(3, 3, 3, 3), (3, 0, 3, 1), (2, 3, 2, 3), (3, 3, 3, 3)]
LOWEST = [3, 0, 2, 3]
# Of 2 * 8192^3 = 1.1 TFLOP each, at 2 PFLOP/s or less: half a second or more.
NUM_PRODUCTS, SIZE = 1000, 8192


def vote(groups: RankGroups) -> list[int]:
    consent = GangConsent()
    return [consent(votes[groups.world.index]) for votes in VOTES]


def test_every_rank_hears_the_lowest_vote(ranks: Ranks) -> None:
    assert ranks.run("ulysses4", vote) == [LOWEST] * 4
    assert ranks.run("tensor2", vote) == [LOWEST] * 2


def vote_before_the_device_is_done(groups: RankGroups) -> tuple[list[int], bool, float]:
    """The votes, if they were in while the device still worked for a collective, and what that gave."""
    consent = GangConsent()
    x = torch.zeros(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    for _ in range(NUM_PRODUCTS):
        x = x @ x
    total = x[0, 0].float() + groups.world.index
    dist.all_reduce(total, group=groups.world.group)
    done = torch.cuda.Event()
    done.record()
    heard = [consent(votes[groups.world.index]) for votes in VOTES]
    return heard, not done.query(), float(total)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", ["ulysses2", "guidance2_ulysses2"])
def test_a_vote_waits_for_no_device_and_for_no_collective_of_nccl(layout: str, gpu_ranks: Ranks) -> None:
    require_gpus(layout)
    answers = gpu_ranks.run(layout, vote_before_the_device_is_done, timeout_s=60.0)
    num = len(answers)
    assert answers == [([min(votes[:num]) for votes in VOTES], True, sum(range(num)))] * num
