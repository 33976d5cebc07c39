"""Which library attends to which shape; and on a GPU, that FlashAttention-4 computes the reference."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from kernels import ops, reference


@pytest.fixture
def flash(monkeypatch):
    """Our module over a library that computes the reference and notes what it was given."""
    given = []

    def flash_attn_func(q, k, v, block_sparse_tensors=None):
        given.append((tuple(q.shape), tuple(k.shape)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if block_sparse_tensors is not None:
            seen = block_sparse_tensors.full_block_idx
            assert (block_sparse_tensors.full_block_cnt == seen.shape[-1]).all()
            assert (block_sparse_tensors.mask_block_cnt == 0).all()
            assert (seen.diff(dim=-1) > 0).all(), "a short block must be the last"
            return reference.block_sparse_attention(q, k, v, seen).transpose(1, 2).contiguous(), None
        return reference.attention(q, k, v, None).transpose(1, 2).contiguous(), None

    library, blocks = types.ModuleType("flash_attn.cute"), types.ModuleType("flash_attn.cute.block_sparsity")
    library.flash_attn_func, blocks.BlockSparseTensorsTorch = flash_attn_func, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", library)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", blocks)
    monkeypatch.delitem(sys.modules, "kernels.flash_attention", raising=False)
    from kernels import flash_attention

    yield flash_attention, given
    # The next test must not find a module over a library that is not there.
    sys.modules.pop("kernels.flash_attention", None)
    del sys.modules["kernels"].flash_attention


def drawn(num_queries, num_keys, channels=64, dtype=torch.bfloat16, device="cpu"):
    draw = torch.Generator(device).manual_seed(7)
    # As the model lays them out: heads inside a token.
    return [
        torch.randn(2, num, 3, channels, generator=draw, device=device).to(dtype).transpose(1, 2)
        for num in (num_queries, num_keys, num_keys)
    ]


def test_long_attention_goes_to_the_library_token_by_token(flash):
    module, given = flash
    q, k, v = drawn(2100, 2060)
    mixed = module.attention(q, k, v, None)
    assert given == [((2, 2100, 3, 64), (2, 2060, 3, 64))]
    assert mixed.shape == q.shape and mixed.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(mixed, reference.attention(q, k, v, None))


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "channels", "dtype", "with_bias"),
    [
        (2100, 2060, 64, torch.bfloat16, True),  # the library knows no bias
        (2100, 2060, 64, torch.float32, False),  # nor float32
        (2100, 2060, 48, torch.bfloat16, False),
        (126, 2100, 64, torch.bfloat16, False),
        (2100, 1024, 64, torch.bfloat16, False),
    ],
)
def test_all_else_stays_with_torch(flash, num_queries, num_keys, channels, dtype, with_bias):
    module, given = flash
    q, k, v = drawn(num_queries, num_keys, channels, dtype)
    bias = torch.zeros(1, 1, num_queries, num_keys, dtype=dtype) if with_bias else None
    torch.testing.assert_close(module.attention(q, k, v, bias), reference.attention(q, k, v, bias))
    assert not given


def test_each_shape_says_once_who_attends_to_it(flash, caplog):
    module, _ = flash
    with caplog.at_level(logging.INFO, logger="kernels.flash_attention"):
        for num_keys in (2060, 2060, 64):
            module.attention(*drawn(2100, num_keys), None)
    facts = [record.facts for record in caplog.records]
    assert [(fact["keys"], fact["library"]) for fact in facts] == [(2060, "flash-attn-4"), (64, "cudnn")]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(300, 300), (130, 500)])
def test_chosen_blocks_go_to_the_library_as_they_are(flash, num_queries, num_keys):
    module, given = flash
    q, k, v = drawn(num_queries, num_keys)
    num_blocks = -(-num_queries // reference.BLOCK_TOKENS), -(-num_keys // reference.BLOCK_TOKENS)
    seen = torch.rand(2, 3, *num_blocks).topk(2).indices.sort().values.int()
    mixed = module.block_sparse_attention(q, k, v, seen)
    assert len(given) == 1 and mixed.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(mixed, reference.block_sparse_attention(q, k, v, seen))


@pytest.mark.parametrize(("capability", "is_flash"), [((9, 0), True), ((10, 0), False)])
def test_fused_operations_on_hopper_attend_by_the_library(flash, monkeypatch, capability, is_flash):
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    module, _ = flash
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fused = ops.fused_ops("cuda")
    assert (fused.attention is module.attention) == is_flash
    assert fused.block_sparse_attention is reference.block_sparse_attention, "for the tier that asks for it"
    sparse = ops.with_block_sparse_attention(fused, "cuda")
    assert sparse.block_sparse_attention is module.block_sparse_attention


class _BrokenLibrary:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("flash_attn"):
            raise OSError("no folder for compiled kernels")


@pytest.mark.parametrize("is_broken", [False, True])
def test_without_the_library_operations_are_as_they_were_and_it_is_said(is_broken, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delitem(sys.modules, "kernels.flash_attention", raising=False)
    if is_broken:
        monkeypatch.setattr(sys, "meta_path", [_BrokenLibrary(), *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    given = ops.reference_ops()
    with caplog.at_level(logging.WARNING, logger="kernels.ops"):
        assert ops._with_flash_attention(given, "cuda") is given
    assert caplog.records[0].facts["library"] == "cudnn"
    assert caplog.records[0].facts["because"].startswith("OSError" if is_broken else "ModuleNotFoundError")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(2048, 2048), (2100, 2060), (8160, 8160), (8160, 3000)])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_on_a_gpu_is_the_reference(num_queries, num_keys, channels, dtype):
    pytest.importorskip("flash_attn.cute", reason="needs the extra `flash`")
    from kernels import flash_attention

    q, k, v = drawn(num_queries, num_keys, channels, dtype, "cuda")
    assert flash_attention._is_for_flash(num_queries, num_keys, channels)
    got = flash_attention.attention(q, k, v, None)
    expected = reference.attention(*(x.float() for x in (q, k, v)), None)
    assert got.dtype == dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
