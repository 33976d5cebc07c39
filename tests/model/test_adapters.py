"""Adapters are fused as the official release fuses them, leave no trace when taken out, and are refused whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.ops import reference_ops
from kernels.reference import quantise_rows
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import DENOISER_PREFIX, CheckpointFile, denoiser_names, load_denoiser
from pipeline.model.fp8 import Fp8Linear

CASES = {"case_a_0.8": [("lora_a", 0.8)], "case_a_0.8_b_-0.5": [("lora_a", 0.8), ("lora_b", -0.5)]}


@pytest.fixture
def loaded(fixtures):
    """A denoiser of dit_ltx2_0, or of another golden folder, and its adapters."""

    def load(dtype=torch.float32, folder="dit_ltx2_0", **precision):
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        denoiser = load_denoiser(checkpoint, reference_ops(), "cpu", dtype, **precision)
        return denoiser, FusedAdapters(denoiser, checkpoint, dtype)

    return load


@pytest.fixture
def files(fixtures):
    return {name: fixtures / "lora" / f"{name}.safetensors" for name in ("lora_a", "lora_b")}


def snapshot(denoiser):
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    scales = {name: m.weight_scale.clone() for name, m in denoiser.named_modules() if isinstance(m, Fp8Linear)}
    return {name: tensor.view(torch.uint8) for name, tensor in (state | scales).items()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def weights_by_name_on_disk(denoiser):
    state = denoiser.state_dict()
    return {name.removeprefix(DENOISER_PREFIX): state[place] for name, place in denoiser_names(state, ()).items()}


@pytest.mark.parametrize("case", CASES)
def test_trap_29_fused_weights_are_the_official_ones(case, loaded, files, fixtures):
    expected = load_file(fixtures / "lora" / f"{case}.safetensors")
    tolerance = 1e-2  # the case's own: the official base is rounded to bfloat16 once more
    denoiser, adapters = loaded()
    adapters.use([(files[name], strength) for name, strength in CASES[case]])
    weights = weights_by_name_on_disk(denoiser)
    names = [key.removeprefix("out.") for key in expected if key.startswith("out.")]
    assert len(names) == 28
    for name in names:
        scale = expected[f"out.{name}"].abs().max()
        assert (weights[name] - expected[f"out.{name}"]).abs().max() <= tolerance * scale, name


def test_trap_29_on_a_bfloat16_base_every_bit_is_official(loaded, files, fixtures):
    expected = load_file(fixtures / "lora" / "case_a_0.8.safetensors")
    denoiser, adapters = loaded(torch.bfloat16)
    adapters.use([(files["lora_a"], 0.8)])
    weights = weights_by_name_on_disk(denoiser)
    names = [key.removeprefix("out_bf16.") for key in expected if key.startswith("out_bf16.")]
    assert len(names) == 28
    assert [name for name in names if not torch.equal(weights[name], expected[f"out_bf16.{name}"])] == []


def test_fused_weights_are_near_the_exact_product(loaded, files, fixtures):
    expected = load_file(fixtures / "lora" / "case_a_0.8.safetensors")
    denoiser, adapters = loaded()
    adapters.use([(files["lora_a"], 0.8)])
    weights = weights_by_name_on_disk(denoiser)
    exact = {key.removeprefix("exact."): value for key, value in expected.items() if key.startswith("exact.")}
    assert max(((weights[n] - w).abs().max() / w.abs().max()).item() for n, w in exact.items()) <= 5e-3


@pytest.mark.parametrize("precision", [{}, {"fp8_blocks": {0, 1}}], ids=["plain", "float8"])
@pytest.mark.parametrize("folder", ["dit_ltx2_0", "dit_ltx2_0_fp8"])
def test_taken_out_adapters_leave_not_a_bit(folder, precision, loaded, files):
    denoiser, adapters = loaded(torch.bfloat16, folder, **precision)
    clean = snapshot(denoiser)
    adapters.use([(files["lora_a"], 0.8), (files["lora_b"], -0.5)])
    fused = snapshot(denoiser)
    assert sum(not torch.equal(fused[name], clean[name]) for name in clean if name.endswith("weight")) == 28
    adapters.use([])
    assert_same_bits(snapshot(denoiser), clean)


def test_another_set_starts_from_clean_weights(loaded, files):
    denoiser, adapters = loaded(torch.bfloat16)
    adapters.use([(files["lora_b"], -0.5)])
    only_b = snapshot(denoiser)
    adapters.use([(files["lora_a"], 0.8)])
    adapters.use([(files["lora_b"], -0.5)])
    assert_same_bits(snapshot(denoiser), only_b)
    assert adapters.num_fusions == 3


def test_the_set_that_is_there_is_not_fused_again(loaded, files):
    _, adapters = loaded()
    adapters.use([])
    assert adapters.num_fusions == 0
    for path in (files["lora_a"], str(files["lora_a"])):
        adapters.use([(path, 0.8)])
        assert adapters.num_fusions == 1
    adapters.use([(files["lora_a"], 0.7)])
    assert adapters.num_fusions == 2


def test_float8_layers_quantise_the_fused_weight_and_not_the_other_way_round(loaded, files, fixtures):
    name = "transformer_blocks.1.attn1.to_q.weight"
    stored, adapter = load_file(fixtures / "dit_ltx2_0" / "model.safetensors"), load_file(files["lora_a"])
    a, b = (adapter[f"diffusion_model.{name.removesuffix('.weight')}.lora_{x}.weight"].bfloat16() for x in "AB")
    weight, scale = quantise_rows(stored[DENOISER_PREFIX + name] + (b * 0.8) @ a)
    denoiser, adapters = loaded(torch.bfloat16, fp8_blocks={1})
    adapters.use([(files["lora_a"], 0.8)])
    layer = denoiser.blocks[1].video.self_attention.to_q
    assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.weight_scale, scale)


def test_an_interrupted_change_is_made_good_by_the_next(loaded, files, monkeypatch):
    denoiser, adapters = loaded(torch.bfloat16)
    clean = snapshot(denoiser)
    write, written = adapters._write, []

    def fails_at_the_tenth(stored, *others):
        written.append(stored)
        if len(written) == 10:
            raise OSError("the disk went away")
        write(stored, *others)

    monkeypatch.setattr(adapters, "_write", fails_at_the_tenth)
    with pytest.raises(OSError):
        adapters.use([(files["lora_a"], 0.8)])
    assert any(not torch.equal(a, b) for a, b in zip(snapshot(denoiser).values(), clean.values(), strict=True))
    adapters.use([])
    assert_same_bits(snapshot(denoiser), clean)


def test_every_problem_of_a_file_is_named_before_anything_changes(loaded, files, tmp_path):
    tensors = load_file(files["lora_b"])
    block = "diffusion_model.transformer_blocks.0."
    del tensors[block + "attn1.to_q.lora_B.weight"]
    tensors[block + "ff.net.2.lora_A.weight"] = torch.zeros(6, 255)
    tensors[block + "ff.net.2.alpha"] = torch.zeros(())
    for factor, shape in (("A", (6, 64)), ("B", (64, 6))):
        tensors[f"diffusion_model.transformer_blocks.2.attn1.to_q.lora_{factor}.weight"] = torch.zeros(shape)
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    denoiser, adapters = loaded()
    clean = snapshot(denoiser)
    with pytest.raises(CheckpointMismatch) as caught:
        adapters.use([(files["lora_a"], 1.0), (path, 1.0)])
    assert str(caught.value).splitlines() == [
        f"{path}: an adapter must hold pairs of tensors diffusion_model.<module>.lora_A.weight and lora_B.weight that "
        "fit the weights of this model, got 5 that do not; use an adapter made for it",
        "  of no weight: diffusion_model.transformer_blocks.2.attn1.to_q.lora_A.weight",
        "  of no weight: diffusion_model.transformer_blocks.2.attn1.to_q.lora_B.weight",
        f"  unknown: {block}ff.net.2.alpha",
        f"  without its other half: {block}attn1.to_q.lora_A.weight",
        f"  wrong shape: {block}ff.net.2.lora_B.weight [64, 6] by [6, 255] must give [64, 256]",
    ]
    assert_same_bits(snapshot(denoiser), clean)
    assert adapters.num_fusions == 0


def test_adapter_of_another_architecture_is_refused(loaded, files):
    _, adapters = loaded(folder="dit_ltxv_0_9_8_2b")
    with pytest.raises(CheckpointMismatch, match="use an adapter made for it") as caught:
        adapters.use([(files["lora_b"], 1.0)])
    assert str(caught.value).count("wrong shape: ") == 4


def test_absent_or_broken_adapter_is_named(loaded, tmp_path):
    _, adapters = loaded()
    with pytest.raises(UsageError, match=r"none\.safetensors: adapter must be an existing file"):
        adapters.use([(tmp_path / "none.safetensors", 1.0)])
    (tmp_path / "cut.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(CheckpointMismatch, match="adapter must be a complete safetensors file, got 2 bytes"):
        adapters.use([(tmp_path / "cut.safetensors", 1.0)])
