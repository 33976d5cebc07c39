"""Block-sparse attention is dense attention that sees less: checked by a mask, and on a GPU by the reference."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from kernels.ops import BLOCK_TOKENS, device_ops, reference_ops, with_block_sparse_attention
from kernels.reference import attention, block_sparse_attention

# (queries, keys): less than a block; whole blocks; a short last block of either.
LENGTHS = [(40, 40), (256, 256), (300, 300), (130, 500), (500, 129)]


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(20261120)


def drawn(num_queries, num_keys, channels, num_seen=None, device="cpu", dtype=torch.float32):
    q, k, v = (torch.randn(2, 3, n, channels, device=device, dtype=dtype) for n in (num_queries, num_keys, num_keys))
    query_blocks, key_blocks = -(-num_queries // BLOCK_TOKENS), -(-num_keys // BLOCK_TOKENS)
    num_seen = num_seen or max(1, key_blocks // 2)
    seen = torch.rand(2, 3, query_blocks, key_blocks, device=device).topk(num_seen).indices.sort().values.int()
    return q, k, v, seen


def masked(q, k, v, seen):
    key_blocks = -(-k.shape[2] // BLOCK_TOKENS)
    is_seen = torch.zeros(*seen.shape[:3], key_blocks, dtype=torch.bool, device=q.device).scatter(3, seen.long(), True)
    visible = is_seen.repeat_interleave(BLOCK_TOKENS, 2)[:, :, : q.shape[2]].repeat_interleave(BLOCK_TOKENS, 3)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[..., : k.shape[2]])


@pytest.mark.parametrize(("num_queries", "num_keys"), LENGTHS)
@pytest.mark.parametrize("channels", [64, 128])
def test_reference_is_attention_under_the_mask_of_the_seen_blocks(num_queries, num_keys, channels):
    q, k, v, seen = drawn(num_queries, num_keys, channels)
    torch.testing.assert_close(block_sparse_attention(q, k, v, seen), masked(q, k, v, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_keys"), LENGTHS)
def test_reference_over_all_blocks_is_dense_attention(num_queries, num_keys):
    q, k, v, seen = drawn(num_queries, num_keys, 64, num_seen=-(-num_keys // BLOCK_TOKENS))
    torch.testing.assert_close(block_sparse_attention(q, k, v, seen), attention(q, k, v, None), rtol=1e-4, atol=1e-5)


def test_operations_import_without_the_library_and_a_cpu_needs_none():
    script = (
        "import sys, kernels.ops as ops\n"
        "assert not {'flash_attn', 'cutlass'} & set(sys.modules)\n"
        "assert ops.with_block_sparse_attention(ops.reference_ops(), 'cpu') == ops.reference_ops()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="the library is installed here")
def test_cuda_operations_without_the_library_are_an_import_error():
    with pytest.raises(ImportError, match="flash_attn"):
        with_block_sparse_attention(device_ops("cuda"), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize(("num_queries", "num_keys"), [*LENGTHS, (8160, 8160)])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_block_sparse_attention_is_the_reference(num_queries, num_keys, channels, dtype):
    pytest.importorskip("flash_attn.cute", reason="needs the extra `flash`")
    q, k, v, seen = drawn(num_queries, num_keys, channels, device="cuda", dtype=dtype)
    # As the model lays values out: heads inside a token.
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    sparse = with_block_sparse_attention(reference_ops(), "cuda").block_sparse_attention
    got, expected = sparse(q, k, v, seen), block_sparse_attention(*(x.float() for x in (q, k, v)), seen)
    assert got.dtype == dtype and got.shape == expected.shape
    error = (got.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
