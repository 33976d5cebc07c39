"""A denoiser held in shares by 2 and 4 ranks predicts what a whole one does, and no rank ever holds it whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.errors import UsageError
from pipeline.model.checkpoint import CheckpointFile, build_on_meta
from pipeline.model.hparams import DenoiserHparams
from pipeline.model.share import Share
from pipeline.parallel import tensor_table
from tests.distributed.equality import assert_equal_up_to_rounding
from tests.distributed.ranks import Call, Raised, Ranks
from tests.distributed.tensor_ranks import (
    Weights,
    bits,
    called,
    held,
    loaded_share,
    reductions_of_a_call,
    with_adapters,
)

PUBLISHED = Path(__file__).parents[2] / "conf" / "published"
CALLS = [
    "dit_ltx2_0/case_t2v",  # a batch of two
    "dit_ltx2_0/case_i2v",
    "dit_ltx2_0/case_masked",
    "dit_ltx2_0/case_stg",
    "dit_ltx2_0/case_video_only",
    "dit_ltx2_0/case_audio_only",
    "dit_ltx2_0_fp8/case_t2v",
    "dit_ltx2_3/case_t2v",  # gated heads, modulated text
    "dit_ltx2_3/case_stg",
    "dit_ltx2_3_fp8/case_t2v",
    "dit_ltx2_5/case_i2v",
    "dit_ltx2_0_video_model/case_t2v",
    "dit_ltxv_0_9_8_2b/case_t2v",  # interleaved rotations
    "dit_ltxv_0_9_8_2b/case_stg_attentionskip",  # samples that keep a part of their input
    "dit_ltxv_0_9_8_2b/case_stg_attentionvalues",
    "dit_ltxv_0_9_8_13b/case_i2v",
]
# Products of float8 numbers that are the same but where a value lay on the edge between two, by a float32 rounding.
FP8_CALLS = ["dit_ltx2_0/case_t2v", "dit_ltx2_0_fp8/case_t2v", "dit_ltx2_3/case_t2v", "dit_ltxv_0_9_8_13b/case_t2v"]
FP8_BOUND = 1e-3
EVERY_BLOCK = frozenset(range(9))
NO_BLOCK: frozenset[int] = frozenset()
LAYOUTS = ["tensor2", "tensor4", "ulysses2_tensor2", "ring2_tensor2"]


@pytest.fixture(scope="module")
def answers(ranks: Ranks, call: Callable[..., Call]) -> Callable[[str, frozenset[int]], list]:
    found: dict[tuple[str, frozenset[int]], list] = {}

    def answers(layout: str, fp8_blocks: frozenset[int]) -> list:
        if (layout, fp8_blocks) not in found:
            calls = {name: call(name) for name in (FP8_CALLS if fp8_blocks else CALLS)}
            found[layout, fp8_blocks] = ranks.run(layout, called, calls, fp8_blocks)
        return found[layout, fp8_blocks]

    return answers


def whole_velocities(call: Call, fp8_blocks: frozenset[int] = NO_BLOCK) -> tuple[Tensor | None, Tensor | None]:
    return call.velocities(Weights(call.model, fp8_blocks=fp8_blocks).load()[0])


def of_share(whole: dict[str, Tensor], rank: int, degree: int) -> dict[str, Tensor]:
    """What a rank should hold of these."""
    regions = {name: tensor_table.region(name, value.shape, Share(rank, degree)) for name, value in whole.items()}
    # A scale belongs to a row, so it is cut where outputs are.
    regions |= {name: () for name in whole if name.endswith("_scale") and len(regions[name]) > 1}
    return {name: value[regions[name]] for name, value in whole.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_every_rank_has_the_velocities_of_a_whole_denoiser(layout, name, answers, call):
    single = whole_velocities(call(name))
    for answer in answers(layout, NO_BLOCK):
        assert not isinstance(answer, Raised), answer
        assert_equal_up_to_rounding(answer[name], single)


@pytest.mark.parametrize("layout", ["tensor2", "tensor4"])
@pytest.mark.parametrize("name", FP8_CALLS)
def test_float8_layers_in_shares_compute_what_whole_ones_do(layout, name, answers, call, record_property):
    single = whole_velocities(call(name), EVERY_BLOCK)
    exact = whole_velocities(call(name))
    for answer in answers(layout, EVERY_BLOCK):
        assert not isinstance(answer, Raised), answer
        for got, one, unrounded in zip(answer[name], single, exact, strict=True):
            if got is not None:
                error = float((got - one).norm() / one.norm())
                record_property("error", f"{error:.1e}")
                # Scales of each rank's own would round as differently as float8 is from float32.
                assert error <= FP8_BOUND < 0.2 * float((one - unrounded).norm() / one.norm())


@pytest.mark.parametrize("layout", ["tensor2", "tensor4"])
@pytest.mark.parametrize("fp8_blocks", [NO_BLOCK, frozenset({1})], ids=["plain", "float8"])
@pytest.mark.parametrize("folder", ["dit_ltx2_0", "dit_ltx2_3", "dit_ltx2_0_fp8", "dit_ltxv_0_9_8_2b"])
def test_a_share_is_cut_from_the_whole_to_the_bit(folder, fp8_blocks, layout, ranks, model):
    weights = Weights(model(folder), torch.bfloat16, fp8_blocks)
    whole = held(weights.load()[0])
    answers = ranks.run(layout, loaded_share, weights)
    for rank, answer in enumerate(answers):
        assert not isinstance(answer, Raised), answer
        expected = bits(of_share(whole, rank, len(answers)))
        assert answer[0].keys() == expected.keys()
        assert [name for name in expected if not torch.equal(answer[0][name], expected[name])] == []


def test_a_rank_reads_no_more_than_it_holds(ranks, model):
    weights = Weights(model("dit_ltx2_0"))
    for tensors, read_bytes in ranks.run("tensor2", loaded_share, weights):
        assert sorted(read_bytes.values()) == sorted(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["ltx2_19b", "ltx2_3_22b", "ltxv_13b", "ltxv_2b"])
def test_two_ranks_hold_55_percent_each_of_a_published_denoiser(name):
    described = json.loads((PUBLISHED / f"{name}.json").read_text())
    config = described["checkpoint"]["config"]["transformer"]
    whole = build_on_meta(DenoiserHparams.from_config(config), reference_ops()).state_dict()
    total = sum(tensor.numel() for tensor in whole.values())
    for rank in range(2):
        share = of_share(whole, rank, 2)
        assert sum(tensor.numel() for tensor in share.values()) <= 0.55 * total
        # Nothing that is read at once is larger than the largest tensor that stays whole, or half of another.
        largest = max(tensor.numel() for place, tensor in whole.items() if share[place].shape == tensor.shape)
        assert max(tensor.numel() for tensor in share.values()) <= max(
            largest, max(tensor.numel() for tensor in whole.values()) // 2
        )


@pytest.mark.parametrize("layout", ["tensor2", "tensor4"])
@pytest.mark.parametrize("fp8_blocks", [NO_BLOCK, EVERY_BLOCK], ids=["plain", "float8"])
def test_adapters_in_shares_are_those_of_the_whole_and_leave_no_trace(fp8_blocks, layout, ranks, call, model, fixtures):
    weights = Weights(model("dit_ltx2_0"), fp8_blocks=fp8_blocks)
    adapters = [(fixtures / "lora" / "lora_a.safetensors", 0.8), (fixtures / "lora" / "lora_b.safetensors", -0.5)]
    example = call("dit_ltx2_0/case_t2v")
    denoiser, fused, _ = weights.load()
    clean = example.velocities(denoiser)
    fused.use(adapters)
    whole, single = held(denoiser), example.velocities(denoiser)
    answers = ranks.run(layout, with_adapters, weights, adapters, example)
    for rank, answer in enumerate(answers):
        assert not isinstance(answer, Raised), answer
        tensors, velocities, nothing_left = answer
        assert nothing_left
        expected = bits(of_share(whole, rank, len(answers)))
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].shape == expected[name].shape for name in expected)
        for got, one, before in zip(velocities, single, clean, strict=True):
            assert float((got - one).norm() / one.norm()) <= (FP8_BOUND if fp8_blocks else 1e-5)
            assert float((before - one).norm() / one.norm()) > 1e-2, "the adapters must matter"


def test_queries_and_keys_of_an_attention_take_one_reduction(ranks, call):
    """Per block of one stream: two norms, two attentions' sums, one feed-forward's."""
    name = "dit_ltxv_0_9_8_2b/case_t2v"
    assert ranks.run("tensor2", reductions_of_a_call, call(name)) == [2 * 5] * 2


def test_every_tensor_of_the_blocks_is_cut_but_for_tables_and_biases_of_sums():
    config = json.loads((PUBLISHED / "ltx2_3_22b.json").read_text())["checkpoint"]["config"]["transformer"]
    whole = build_on_meta(DenoiserHparams.from_config(config), reference_ops()).state_dict()
    kept = {
        name.split(".", 2)[2]
        for name, value in whole.items()
        if name.startswith("blocks.") and not tensor_table.region(name, value.shape, Share(0, 2))
    }
    assert {name for name in kept if not name.endswith("table")} == {
        name for name in kept if name.endswith(("to_out.bias", "narrow.bias"))
    }
    outside = [name for name in whole if not name.startswith("blocks.")]
    assert not any(tensor_table.region(name, whole[name].shape, Share(0, 2)) for name in outside)


def test_a_degree_that_does_not_divide_the_heads_is_refused_on_every_rank(ranks, model):
    answers = ranks.run("tensor3", loaded_share, Weights(model("dit_ltx2_0")))
    for answer in answers:
        assert isinstance(answer, Raised) and answer.error == "UsageError"
        assert answer.message == (
            "the degree of tensor parallelism must divide the model's 4 video heads and 4 audio heads, got 3; use one "
            "of [1, 2, 4]"
        )


def test_published_models_can_be_cut_into_2_4_and_8():
    config = json.loads((PUBLISHED / "ltx2_19b.json").read_text())["checkpoint"]["config"]["transformer"]
    hparams = DenoiserHparams.from_config(config)
    assert tensor_table.degrees(hparams) == [1, 2, 4, 8, 16, 32]
    with pytest.raises(
        UsageError, match=r"32 video heads and 32 audio heads, got 6; use one of \[1, 2, 4, 8, 16, 32\]"
    ):
        tensor_table.require_degree(hparams, 6)


def test_every_problem_of_a_file_is_listed_on_every_rank_before_anything_is_read(ranks, model, tmp_path):
    published = model("dit_ltx2_0")
    tensors = load_file(published)
    block = "model.diffusion_model.transformer_blocks.1."
    tensors[block + "attn1.to_q.weight"] = torch.zeros(32, 64)
    del tensors[block + "ff.net.2.weight"]
    tensors[block + "odd.weight"] = torch.zeros(2)
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata={"config": json.dumps(CheckpointFile(published).config)})
    for answer in ranks.run("tensor2", loaded_share, Weights(path)):
        assert isinstance(answer, Raised) and answer.error == "CheckpointMismatch"
        assert answer.message.splitlines()[1:] == [
            f"  missing: {block}ff.net.2.weight",
            f"  unexpected: {block}odd.weight",
            f"  wrong shape: {block}attn1.to_q.weight must be [64, 64], got [32, 64]",
        ]
