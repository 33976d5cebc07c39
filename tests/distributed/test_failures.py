"""A rank that fails takes the others with it: none of them waits for ever, and none goes on alone."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import StageConfig
from pipeline.geometry import LatentShape
from pipeline.parallel.guidance import SpreadPasses
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.start import join
from pipeline.records.gang import Member
from pipeline.records.parallel import ParallelLayout
from tests.distributed.ranks import Clip, Raised, Ranks, spread_over

TIMEOUT_S = 30.0
PATIENCE_S = 2.0
FAILING = 1


@pytest.fixture(scope="session")
def clip(model: Callable[[str], Path]) -> Clip:
    guidance = GuidanceConfig(video=StreamGuidance(cfg=3.0))
    stage = StageConfig(sigmas=[1.0, 0.5, 0.0], guidance=[guidance])
    return Clip(model("dit_ltx2_0"), stage, LatentShape(3, 3, 4, 9, 24.0))


def raise_in_the_second_step(groups: RankGroups, clip: Clip) -> None:
    denoiser = spread_over(groups, clip.model)
    calls = []

    class Failing:
        hparams, prepare = denoiser.hparams, denoiser.prepare

        def __call__(self, *given: object) -> object:
            calls.append(given)
            if groups.world.index == FAILING and len(calls) == 2:
                raise ValueError("this rank has had enough")
            return denoiser(*given)

    clip.denoised(Failing(), SpreadPasses(groups.guidance))


@pytest.mark.parametrize("layout", ["ulysses2", "ring2", "guidance2", "ulysses4", "ring4", "guidance2_ulysses2"])
def test_a_rank_that_raises_in_a_step_makes_all_raise(layout: str, ranks: Ranks, clip: Clip) -> None:
    answers = ranks.run(layout, raise_in_the_second_step, clip, timeout_s=TIMEOUT_S)
    assert all(isinstance(answer, Raised) for answer in answers)
    assert (answers[FAILING].error, answers[FAILING].message) == ("ValueError", "this rank has had enough")
    for answer in answers[:FAILING] + answers[FAILING + 1 :]:
        # Reset, where it closed before it had read what others sent.
        assert answer.error == "RuntimeError" and re.search("Connection (closed|reset) by peer", answer.message)
        assert answer.after_s < TIMEOUT_S / 3, "they noticed, and did not wait for their timeout"


def stay_away(groups: RankGroups, clip: Clip) -> None:
    if groups.world.index == FAILING:
        time.sleep(2.5 * PATIENCE_S)
        return
    clip.denoised(spread_over(groups, clip.model))


@pytest.mark.parametrize("layout", ["ulysses2", "ring2"])
def test_a_rank_that_stays_away_is_waited_for_no_longer_than_the_timeout(layout: str, ranks: Ranks, clip: Clip) -> None:
    other, _ = ranks.run(layout, stay_away, clip, timeout_s=PATIENCE_S)
    assert isinstance(other, Raised) and other.error == "RuntimeError"
    assert other.after_s == pytest.approx(PATIENCE_S, abs=1.5)


def test_a_rank_that_nobody_meets_gives_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        leader = Member(0, 2, "127.0.0.1", port, server.detach())
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="1/2 clients joined"):
        join(leader, ParallelLayout(ulysses=2), "cpu", PATIENCE_S)
    assert time.monotonic() - begin == pytest.approx(PATIENCE_S, abs=1.5)


def succeed(groups: RankGroups) -> int:
    return groups.world.size


def test_after_a_failure_the_same_processes_can_be_ranks_again(ranks: Ranks, clip: Clip) -> None:
    ranks.run("ulysses4", raise_in_the_second_step, clip, timeout_s=TIMEOUT_S)
    assert ranks.run("ulysses4", succeed) == [4, 4, 4, 4]
