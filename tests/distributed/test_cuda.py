"""On GPUs: attention that tells its log-sum-exp, and a denoiser spread over them through NCCL."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kernels import reference
from kernels.ops import device_ops
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.sequence import SequenceParallelDenoiser
from pipeline.parallel.xfuser_usp import xfuser_usp
from tests.distributed.ranks import Call, Raised, Ranks, loaded, require_gpus
from tests.model.test_fused import moved

# Of the velocities' directions, in bfloat16 against float32 on one rank.
COSINE = 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize(("num_queries", "num_keys", "head_dim"), [(256, 512, 128), (126, 8160, 64), (63, 35, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cudnn_tells_the_log_sum_exp_of_the_reference(
    num_queries: int, num_keys: int, head_dim: int, with_bias: bool
) -> None:
    draw = torch.Generator("cuda").manual_seed(1)
    # As slots are given them: token by token, heads second.
    q, k, v = (
        torch.randn(2, num, 4, head_dim, generator=draw, device="cuda").bfloat16().transpose(1, 2)
        for num in (num_queries, num_keys, num_keys)
    )
    bias = torch.randn(2, 1, num_queries, num_keys, generator=draw, device="cuda").bfloat16() if with_bias else None
    mixed, lse = device_ops("cuda").attention_with_lse(q, k, v, bias)
    expected, expected_lse = reference.attention_with_lse(q, k, v, bias)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, num_queries)
    torch.testing.assert_close(mixed, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0.01)


def velocities_on_gpu(groups: RankGroups, call: Call, with_xfuser: bool) -> tuple[Tensor, Tensor]:
    denoiser = copy.deepcopy(loaded(call.model)).to("cuda", torch.bfloat16)
    even = xfuser_usp(groups.layout) if with_xfuser else None
    spread = SequenceParallelDenoiser(denoiser, groups, device_ops("cuda").attention_with_lse, even)
    spread.overlap_audio(torch.cuda.Stream())
    video_BTC, audio_BTC = spread(moved(call.video, "cuda"), moved(call.audio, "cuda"))
    return video_BTC.float().cpu(), audio_BTC.float().cpu()


def _assert_as_on_one(answers: list[tuple[Tensor, Tensor]], call: Call) -> None:
    for answer in answers:
        assert not isinstance(answer, Raised), answer
        for got, single in zip(answer, call.velocities(loaded(call.model)), strict=True):
            assert float(cosine_similarity(got.flatten(), single.flatten(), dim=0)) >= COSINE


@pytest.mark.multi_gpu
@pytest.mark.parametrize("num_tokens", [60, 59])
@pytest.mark.parametrize("layout", ["ulysses2", "ring2", "ulysses4", "ring2_ulysses2"])
def test_ranks_on_gpus_have_the_velocities_of_one(
    layout: str, num_tokens: int, gpu_ranks: Ranks, call: Callable[..., Call]
) -> None:
    require_gpus(layout)
    given = call("dit_ltx2_0/case_t2v", num_tokens)
    _assert_as_on_one(gpu_ranks.run(layout, velocities_on_gpu, given, False, timeout_s=60.0), given)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", ["ulysses2", "ring2"])
def test_xfuser_exchanges_to_the_same_velocities(layout: str, call: Callable[..., Call]) -> None:
    require_gpus(layout)
    pytest.importorskip("xfuser", reason="xfuser is not installed")
    given = call("dit_ltx2_0/case_t2v")
    # Its globals are made once a process, for one layout.
    ranks = Ranks(2, "cuda")
    _assert_as_on_one(ranks.run(layout, velocities_on_gpu, given, True, timeout_s=60.0), given)
    ranks.stop()
