"""Float8: published files are read exactly, and the float8 tier is off by what rounding to e4m3 explains, no more."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import scaled_mm
from kernels.ops import device_ops, reference_ops
from kernels.reference import FP8_MAX, fp8_linear, quantise_rows
from kernels.rows import ScaledRows
from pipeline.errors import CheckpointMismatch
from pipeline.model.checkpoint import DENOISER_PREFIX, CheckpointFile, load_denoiser
from pipeline.model.fp8 import Fp8Linear

# e4m3 has 3 bits behind the point: a number is off by a sixteenth of itself at most, or half the smallest step, 2^-10.
HALF_STEP, HALF_SMALLEST = 2**-4, 2**-10
QUERY = "transformer_blocks.1.attn1.to_q."


@pytest.fixture
def scaled_file(fixtures):
    return fixtures / "dit_ltx2_0_fp8" / "model.safetensors"


@pytest.fixture
def rewritten(scaled_file, tmp_path):
    """Writes the scaled tiny model again after a change to its tensors."""

    def rewrite(change):
        tensors = load_file(scaled_file)
        change(tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, metadata={"config": json.dumps(CheckpointFile(scaled_file).config)})
        return path

    return rewrite


def load(path, dtype=None, **precision):
    return load_denoiser(CheckpointFile(path), reference_ops(), "cpu", dtype, **precision)


def rows_of(x):
    return ScaledRows(*quantise_rows(x), x.dtype)


def bits(tensor):
    return tensor.view(torch.uint8)


def float8_layers(denoiser):
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, Fp8Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_30_stored_weight_times_scale_is_the_weight(dtype, scaled_file):
    stored = load_file(scaled_file)
    weight = stored[DENOISER_PREFIX + QUERY + "weight"]
    assert weight.dtype == torch.float8_e4m3fn
    exact = weight.float() * stored[DENOISER_PREFIX + QUERY + "weight_scale"]
    assert torch.equal(load(scaled_file, dtype).blocks[1].video.self_attention.to_q.weight, exact.to(dtype))


def test_without_a_dtype_scaled_weights_become_bfloat16_like_the_rest_of_the_file(scaled_file):
    assert {parameter.dtype for parameter in load(scaled_file).parameters()} == {torch.bfloat16}


def test_float8_weight_without_a_scale_is_refused(rewritten):
    path = rewritten(lambda tensors: tensors.pop(DENOISER_PREFIX + QUERY + "weight_scale"))
    with pytest.raises(CheckpointMismatch) as caught:
        load(path)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"unexpected: {DENOISER_PREFIX}{QUERY}input_scale",
        f"wrong kind: {DENOISER_PREFIX}{QUERY}weight must come with {DENOISER_PREFIX}{QUERY}weight_scale where it is "
        "float8 e4m3, got torch.float8_e4m3fn without",
    ]


def test_scale_without_a_float8_weight_is_refused(rewritten):
    def change(tensors):
        tensors[DENOISER_PREFIX + QUERY + "weight"] = tensors[DENOISER_PREFIX + QUERY + "weight"].bfloat16()

    with pytest.raises(
        CheckpointMismatch, match=rf"unexpected: {DENOISER_PREFIX}{QUERY}weight_scale".replace(".", r"\.")
    ):
        load(rewritten(change))


def test_scale_a_row_is_refused_on_disk(rewritten):
    def change(tensors):
        tensors[DENOISER_PREFIX + QUERY + "weight_scale"] = torch.ones(64, 1)

    with pytest.raises(
        CheckpointMismatch, match=r"weight_scale must be one float32 number, got torch.float32 \[64, 1\]"
    ):
        load(rewritten(change))


def test_whole_numbers_in_place_of_a_weight_are_refused(rewritten):
    def change(tensors):
        tensors[DENOISER_PREFIX + "proj_out.weight"] = tensors[DENOISER_PREFIX + "proj_out.weight"].to(torch.int32)

    with pytest.raises(CheckpointMismatch, match=r"proj_out.weight must be like torch.float32, got torch.int32"):
        load(rewritten(change))


def test_rows_are_scaled_to_the_largest_number_and_rounded_by_half_a_step():
    x = torch.randn(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    x[3] = 0
    quantised, scale = quantise_rows(x)
    assert quantised.dtype == torch.float8_e4m3fn and scale.shape == (7, 1) and scale.dtype == torch.float32
    peaks = quantised.float().abs().amax(dim=1)
    assert peaks.tolist() == [FP8_MAX] * 3 + [0.0] + [FP8_MAX] * 3
    error = (quantised.float() * scale - x).abs()
    assert (error <= HALF_STEP * x.abs() + HALF_SMALLEST * scale).all()


def test_float8_product_is_that_of_the_rounded_numbers_and_near_the_exact_one():
    x, weight, bias = torch.randn(2, 5, 64), torch.randn(32, 64), torch.randn(32)
    scaled_weight = quantise_rows(weight)
    got = fp8_linear(rows_of(x), *scaled_weight, bias)
    assert got.shape == (2, 5, 32)
    rounded_x, rounded_weight = (q.double() * s for q, s in (quantise_rows(x.flatten(0, 1)), scaled_weight))
    expected = (rounded_x @ rounded_weight.T + bias).unflatten(0, (2, 5))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    # Each factor is off by a sixteenth at most, or by the smallest half step; so then is each product of the sum.
    allowed = (2 * HALF_STEP + HALF_STEP**2) * (x.abs() @ weight.abs().T) + 0.01
    assert ((got - torch.nn.functional.linear(x, weight, bias)).abs() <= allowed).all()


def test_float8_layers_stand_in_the_blocks_asked_for_and_nowhere_else(fixtures):
    denoiser = load(fixtures / "dit_ltx2_3" / "model.safetensors", torch.bfloat16, fp8_blocks=range(1, 2))
    layers = float8_layers(denoiser)
    linear = {name for name, module in denoiser.blocks[1].named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(layers) == 6 * 4 + 2 * 2 and all(name.startswith("blocks.1.") for name in layers)
    assert len(linear) == 6 and all(name.endswith("to_gate_logits") for name in linear)


def test_weights_of_the_float8_tier_are_the_row_wise_rounded_ones(fixtures):
    path = fixtures / "dit_ltx2_0" / "model.safetensors"
    weight, scale = quantise_rows(load_file(path)[DENOISER_PREFIX + QUERY + "weight"].bfloat16())
    layer = load(path, torch.bfloat16, fp8_blocks={1}).blocks[1].video.self_attention.to_q
    assert torch.equal(bits(layer.weight), bits(weight)) and torch.equal(layer.weight_scale, scale)
    assert layer.bias.dtype == torch.bfloat16


def test_published_float8_weights_are_taken_over_byte_by_byte(scaled_file):
    stored = load_file(scaled_file)
    layer = load(scaled_file, torch.bfloat16, fp8_blocks={1}).blocks[1].video.self_attention.to_q
    assert torch.equal(bits(layer.weight), bits(stored[DENOISER_PREFIX + QUERY + "weight"]))
    assert torch.equal(layer.weight_scale, stored[DENOISER_PREFIX + QUERY + "weight_scale"].expand(64, 1))


def test_no_weight_outlives_its_quantisation(fixtures):
    weights, alive = [], []

    class Watched(CheckpointFile):
        def read(self, name, *how):
            alive.append(sum(weight() is not None for weight in weights))
            tensor = super().read(name, *how)
            if ".transformer_blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
                weights.append(weakref.ref(tensor))
            return tensor

    checkpoint = Watched(fixtures / "dit_ltx2_0" / "model.safetensors")
    load_denoiser(checkpoint, reference_ops(), "cpu", torch.bfloat16, fp8_blocks={0, 1})
    assert len(weights) == 2 * (6 * 4 + 2 * 2)
    assert max(alive) <= 1


@pytest.mark.parametrize("folder", ["dit_ltx2_0", "dit_ltx2_3", "dit_ltxv_0_9_8_13b"])
def test_velocities_of_the_float8_tier_stay_near_the_exact_ones(folder, fixtures, golden):
    case = golden(f"{folder}/case_t2v")
    denoiser = load(fixtures / folder / "model.safetensors", torch.float32, fp8_blocks=range(9))
    for got, name in zip(denoiser(case.video, case.audio), ("video", "audio"), strict=True):
        if got is not None:
            expected = case["out.velocity" if "ltxv" in folder else f"out.{name}"]
            error = ((got - expected).norm() / expected.norm()).item()
            # A few per cent a layer, of random sign, over two or three blocks; exact weights would give 1e-6.
            assert 1e-3 < error < 0.1


def test_operations_of_a_device_differ_only_where_it_has_units_for_them():
    assert device_ops("cpu") == reference_ops()
    assert device_ops("cuda:1") == device_ops("cuda") != reference_ops()
    assert device_ops("cuda").fp8_linear is scaled_mm.fp8_linear


def test_cuda_products_ask_for_bfloat16():
    with pytest.raises(
        TypeError, match=r"must stand for torch\.bfloat16 for float8 products on CUDA, got torch\.float32"
    ):
        scaled_mm.fp8_linear(rows_of(torch.zeros(1, 1, 16)), *quantise_rows(torch.zeros(16, 16)), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize("num_tokens", [1, 7, 640])
@pytest.mark.parametrize("with_bias", [True, False])
def test_cuda_float8_product_is_the_reference(num_tokens, with_bias):
    x = rows_of(torch.randn(2, num_tokens, 256, dtype=torch.bfloat16, device="cuda"))
    weight, scale = quantise_rows(torch.randn(512, 256, device="cuda"))
    bias = torch.randn(512, dtype=torch.bfloat16, device="cuda") if with_bias else None
    got, expected = scaled_mm.fp8_linear(x, weight, scale, bias), fp8_linear(x, weight, scale, bias)
    assert got.dtype == expected.dtype == torch.bfloat16 and got.shape == expected.shape
    # One step of bfloat16 is 2^-7 of a number's power of two; tensor cores sum in fewer bits than float32.
    assert (
        (got - expected).float().abs() <= 2**-7 * expected.float().abs() + 2e-3 * expected.float().abs().max()
    ).all()
