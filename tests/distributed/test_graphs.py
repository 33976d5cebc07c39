"""A spread denoiser's calls are replayed by every rank, exchanges and all, to the bits of calls that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import device_ops
from pipeline.model.graphs import ON_CUDA, GraphedDenoiser, Recorder
from pipeline.model.streams import TokenStream
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.sequence import SequenceParallelDenoiser
from tests.distributed.ranks import Call, Raised, Ranks, loaded, require_gpus
from tests.model.test_fused import moved

CALLS = 4


def again(stream: TokenStream, step: int) -> TokenStream:
    return replace(stream, tokens_BTC=stream.tokens_BTC + 0.1 * step)


def replayed_and_not(
    groups: RankGroups, call: Call, device: str, fails_on: int | None = None
) -> tuple[int, list[bool]]:
    """Graphs that there were, and whether each step's velocities were those of a call. One rank may fail to capture."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    denoiser = copy.deepcopy(loaded(call.model)).to(device, dtype)
    spread = SequenceParallelDenoiser(denoiser, groups, device_ops(device).attention_with_lse)
    if device == "cuda":
        spread.overlap_audio(torch.cuda.Stream())

    def record(given: Callable[[], tuple[Tensor | None, Tensor | None]]) -> Callable[[], tuple[Tensor | None, ...]]:
        if groups.world.index == fails_on:
            raise torch.OutOfMemoryError("no room for a graph")
        return given

    recorder = ON_CUDA if device == "cuda" else Recorder("cpu", record)
    graphed = GraphedDenoiser(spread, 10**6, recorder=recorder, weights=denoiser)
    video, audio = moved(call.video, device), moved(call.audio, device)
    with torch.inference_mode():
        conditioning = spread.prepare(video, audio)
        equal = []
        for step in range(CALLS):
            streams = again(video, step), again(audio, step)
            wanted, got = spread(*streams, conditioning), graphed(*streams, conditioning)
            equal.append(all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True)))
    return graphed.num_graphs, equal


@pytest.mark.parametrize("num_tokens", [60, 59])
@pytest.mark.parametrize("layout", ["ulysses2", "ring2", "ring2_ulysses2"])
def test_every_rank_replays_to_the_bit(layout: str, num_tokens: int, ranks: Ranks, call: Callable[..., Call]) -> None:
    for answer in ranks.run(layout, replayed_and_not, call("dit_ltx2_0/case_t2v", num_tokens), "cpu"):
        assert not isinstance(answer, Raised), answer
        assert answer == (1, [True] * CALLS)


def test_a_rank_that_cannot_capture_goes_on_beside_one_that_replays(ranks: Ranks, call: Callable[..., Call]) -> None:
    answers = ranks.run("ulysses2", replayed_and_not, call("dit_ltx2_0/case_t2v"), "cpu", 1)
    assert answers == [(1, [True] * CALLS), (0, [True] * CALLS)]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", ["ulysses2", "ring2", "ulysses4"])
def test_graphs_of_ranks_on_gpus_hold_their_exchanges(layout: str, gpu_ranks: Ranks, call: Callable[..., Call]) -> None:
    require_gpus(layout)
    given = call("dit_ltx2_0/case_t2v", 59)
    for answer in gpu_ranks.run(layout, replayed_and_not, given, "cuda", timeout_s=60.0):
        assert not isinstance(answer, Raised), answer
        assert answer == (1, [True] * CALLS)
