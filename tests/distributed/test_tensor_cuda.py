"""On GPUs: a denoiser held in shares, through NCCL and the fused operations, its audio queued beside the video."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kernels.ops import fused_ops
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.tensor import TensorParallel
from tests.distributed.ranks import Call, Raised, Ranks, loaded
from tests.model.test_fused import moved

# Of the velocities' directions, in bfloat16 or float8 against float32 on one rank.
COSINE = {"exact": 0.999, "fp8": 0.99}


def velocities_on_gpu(groups: RankGroups, call: Call, linear: str) -> tuple[Tensor, Tensor]:
    group, audio_group = groups.tensor.group, dist.new_group(list(groups.tensor.ranks))
    assert group is not None and isinstance(audio_group, dist.ProcessGroup)
    denoiser = load_denoiser(
        CheckpointFile(call.model),
        fused_ops("cuda"),
        "cuda",
        torch.bfloat16,
        fp8_blocks=range(9 if linear == "fp8" else 0),
        sharding=TensorParallel(group, audio_group),
    )
    denoiser.overlap_audio(torch.cuda.Stream())
    video_BTC, audio_BTC = denoiser(moved(call.video, "cuda"), moved(call.audio, "cuda"))
    return video_BTC.float().cpu(), audio_BTC.float().cpu()


@pytest.mark.multi_gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs 2 GPUs; run make test-multi-gpu on a machine with them"
)
@pytest.mark.parametrize("linear", ["exact", "fp8"])
@pytest.mark.parametrize("folder", ["dit_ltx2_0", "dit_ltx2_3"])
def test_shares_on_two_gpus_predict_what_one_rank_does(folder: str, linear: str, call: Callable[..., Call]) -> None:
    recorded = call(f"{folder}/case_t2v")
    single = recorded.velocities(loaded(recorded.model))
    ranks = Ranks(2, "cuda")
    try:
        answers = ranks.run("tensor2", velocities_on_gpu, recorded, linear, timeout_s=60.0)
    finally:
        ranks.stop()
    for answer in answers:
        assert not isinstance(answer, Raised), answer
        for got, expected in zip(answer, single, strict=True):
            assert expected is not None
            assert cosine_similarity(got.flatten(), expected.flatten(), dim=0) >= COSINE[linear]
