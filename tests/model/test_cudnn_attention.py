"""Attention as a GPU computes it, against the reference in float32."""

from __future__ import annotations

import pytest
import torch

from kernels import cudnn_attention, reference


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "keys", "head_dim"), [(1, 1, 64), (126, 1024, 64), (513, 513, 128), (999, 77, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_on_the_gpu_is_the_reference(dtype, tokens, keys, head_dim, with_bias):
    generator = torch.Generator("cuda").manual_seed(0)
    # As the blocks hand them over: heads are a view of a wider tensor.
    q, k, v = (
        torch.randn(2, size, 4 * head_dim, device="cuda", generator=generator).unflatten(-1, (4, -1)).transpose(1, 2)
        for size in (tokens, keys, keys)
    )
    bias = torch.randn(2, 1, 1, keys, device="cuda", generator=generator) if with_bias else None
    expected = reference.attention(q, k, v, bias)
    got = cudnn_attention.attention(*(x.to(dtype) for x in (q, k, v)), None if bias is None else bias.to(dtype))
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert got.dtype == dtype and (got.float() - expected).abs().max() <= bound * expected.abs().max()
