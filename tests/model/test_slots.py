"""The denoiser computes through its slots, and attention alone can be replaced from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.ops import OpSet, reference_ops
from pipeline.model.attention import Attention
from pipeline.model.checkpoint import CheckpointFile, load_denoiser

Golden = Callable[[str], Any]


def test_every_operation_of_the_set_is_used_as_often_as_the_layers_say(fixtures: Path, golden: Golden) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            calls[name] += 1
            return operation(*args)

        return call

    plain = reference_ops()
    ops = OpSet(**{field.name: counted(field.name, getattr(plain, field.name)) for field in fields(OpSet)})

    def calls_of(folder: str, **precision: object) -> Counter[str]:
        calls.clear()
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        denoiser = load_denoiser(checkpoint, ops, "cpu", torch.float32, **precision)
        case = golden(f"{folder}/case_t2v")
        denoiser(case.video, case.audio)
        return Counter(calls)

    num_layers = 2
    assert calls_of("dit_ltx2_0") == {
        "attention": 6 * num_layers,
        "qk_norm_rope": 8 * num_layers,
        "qk_norm_rope_both": 2 * num_layers,
        "modulated_rms_norm": 2 * num_layers + 2,
        "gated_residual_norm": 8 * num_layers - 2,
        "gated_residual": 2,
        "linear_gelu": 2 * num_layers,
        "gelu_tanh": 2,
        "modulated_layer_norm": 2,
    }
    assert calls_of("dit_ltx2_3") == {
        "attention": 6 * num_layers,
        "qk_norm_rope": 8 * num_layers,
        "qk_norm_rope_both": 2 * num_layers,
        "gate_heads": 6 * num_layers,
        "modulated_rms_norm": 2 * num_layers + 2,
        "gated_residual_norm": 8 * num_layers - 2,
        "gated_residual": 2,
        "linear_gelu": 2 * num_layers,
        "modulated_layer_norm": 2,
    }
    assert calls_of("dit_ltxv_0_9_8_2b") == {
        "attention": 2 * num_layers,
        "qk_norm_rope_interleaved": 2 * num_layers,
        "qk_norm_rope_both_interleaved": num_layers,
        "modulated_rms_norm": 1,
        "gated_residual_norm": 2 * num_layers - 1,
        "gated_residual": num_layers + 1,
        "linear_gelu": num_layers,
        "gelu_tanh": 1,
        "modulated_layer_norm": 1,
    }
    # Six attentions of four layers and two feed-forwards of two; in the second block only.
    num_float8 = 6 * 4 + 2 * 2
    in_float8 = calls_of("dit_ltx2_0", fp8_blocks={1})
    assert in_float8["fp8_linear"] == num_float8
    assert in_float8["modulated_rms_norm_quantised"] == 2 and in_float8["gated_residual_norm_quantised"] == 8
    assert in_float8["gelu_quantised"] == 2
    # Beside the weights: what attention gives to its output projection, and the two texts.
    assert in_float8["quantise_rows"] == num_float8 + 6 + 2
    gated = calls_of("dit_ltx2_3", fp8_blocks={1})
    # Gates read their input as it is, so each attention quantises it itself: once if it attends to itself, else twice.
    assert gated["gated_residual_norm_quantised"] == gated["gelu_quantised"] == 2
    assert gated["quantise_rows"] == num_float8 + 6 + 2 + 4 * 2


def test_keys_and_values_of_text_are_computed_once_where_no_noise_level_modulates_them(
    fixtures: Path, golden: Golden
) -> None:
    for folder, streams, with_keys_values in (("dit_ltx2_0", 2, True), ("dit_ltx2_3", 2, False)):
        denoiser = load_denoiser(CheckpointFile(fixtures / folder / "model.safetensors"), reference_ops(), "cpu")
        case = golden(f"{folder}/case_t2v")
        texts = [block.video.text_attention for block in denoiser.blocks]
        texts += [block.audio.text_attention for block in denoiser.blocks]
        calls: Counter[str] = Counter()
        for attention in texts:
            attention.to_k.register_forward_hook(lambda *_, calls=calls: calls.update(["to_k"]))
        prepared = denoiser.prepare(case.video, case.audio)
        assert (prepared.video.text_keys_values is not None) == with_keys_values
        steps = [denoiser(case.video, case.audio, prepared) for _ in range(3)]
        assert calls["to_k"] == streams * len(denoiser.blocks) * (1 if with_keys_values else 3)
        for got, want in zip(steps[-1], denoiser(case.video, case.audio), strict=True):
            assert torch.equal(got, want)


def test_replacing_attend_is_enough_to_change_how_attention_runs(fixtures: Path, golden: Golden) -> None:
    denoiser = load_denoiser(CheckpointFile(fixtures / "dit_ltx2_0" / "model.safetensors"), reference_ops(), "cpu")
    case = golden("dit_ltx2_0/case_masked")
    expected = denoiser(case.video, case.audio)
    replaced = 0
    for module in denoiser.modules():
        if isinstance(module, Attention):
            module.attend = _half_of_the_heads_at_a_time(module.attend)
            replaced += 1
    assert replaced == 6 * denoiser.hparams.num_layers
    for got, want in zip(denoiser(case.video, case.audio), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _half_of_the_heads_at_a_time(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def split(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None) -> Tensor:
        halves = zip(q_BHTK.chunk(2, 1), k_BHSK.chunk(2, 1), v_BHSK.chunk(2, 1), strict=True)
        return torch.cat([attend(q, k, v, bias) for q, k, v in halves], dim=1)

    return split
