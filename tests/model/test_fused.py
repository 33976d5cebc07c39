"""The denoiser through the kernels of a GPU: the official numbers in float32, the plain operations' in fewer bits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import device_ops, fused_ops, reference_ops
from pipeline.model.checkpoint import CheckpointFile, load_denoiser

# The recorded tolerance: products of a GPU in float32 sum in another order than the CPU that recorded.
OUTPUT_BOUND = 1e-4
# Of a few layers of toy width, each rounded to bfloat16 in another place or not at all.
BFLOAT16_BOUND, FLOAT8_BOUND = 2e-2, 6e-2
CASES = [
    "dit_ltx2_0/t2v",
    "dit_ltx2_0/i2v",
    "dit_ltx2_0/masked",
    "dit_ltx2_0/stg",
    "dit_ltx2_3/i2v",
    "dit_ltx2_3/stg",
    "dit_ltx2_5/i2v",
    "dit_ltxv_0_9_8_2b/i2v",
    "dit_ltxv_0_9_8_13b/stg_attentionskip",
    "dit_ltxv_0_9_8_13b/stg_transformerblock",
]

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one"),
]


def moved(value: Any, device: str) -> Any:
    """A stream with all its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if value is None or not hasattr(value, "__dataclass_fields__"):
        return value
    return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})


def velocities(folder, case, fixtures, ops, dtype, **precision):
    checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
    denoiser = load_denoiser(checkpoint, ops, "cuda", dtype, **precision)
    outputs = denoiser(moved(case.video, "cuda"), moved(case.audio, "cuda"), perturbations=case.perturbations)
    return [output for output in outputs if output is not None]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def test_fused_operations_are_the_plain_ones_on_the_cpu():
    assert fused_ops("cpu") == reference_ops()


@pytest.mark.parametrize("name", CASES)
class TestOnAGpu:
    pytestmark = on_a_gpu

    def test_fused_velocities_in_float32_are_those_of_the_official_model(self, name, fixtures, golden):
        folder, case_name = name.split("/")
        case = golden(f"{folder}/case_{case_name}")
        got = velocities(folder, case, fixtures, fused_ops("cuda"), torch.float32)
        keys = ["out.velocity"] if "ltxv" in folder else ["out.video", "out.audio"][: len(got)]
        for output, key in zip(got, keys, strict=True):
            error = ((output.cpu() - case[key]).abs().max() / case[key].abs().max()).item()
            assert error <= OUTPUT_BOUND

    def test_audio_queued_beside_the_video_changes_no_bit(self, name, fixtures, golden):
        folder, case_name = name.split("/")
        case = golden(f"{folder}/case_{case_name}")
        checkpoint = CheckpointFile(fixtures / folder / "model.safetensors")
        denoiser = load_denoiser(checkpoint, fused_ops("cuda"), "cuda", torch.bfloat16)
        streams = moved(case.video, "cuda"), moved(case.audio, "cuda")
        in_turn = denoiser(*streams, perturbations=case.perturbations)
        denoiser.overlap_audio(torch.cuda.Stream())
        for _ in range(3):
            for got, expected in zip(denoiser(*streams, perturbations=case.perturbations), in_turn, strict=True):
                assert expected is None or torch.equal(got, expected)

    @pytest.mark.parametrize(("precision", "bound"), [({}, BFLOAT16_BOUND), ({"fp8_blocks": {0, 1}}, FLOAT8_BOUND)])
    def test_fused_velocities_in_lower_precision_are_near_the_plain_ones(
        self, precision, bound, name, fixtures, golden
    ):
        folder, case_name = name.split("/")
        case = golden(f"{folder}/case_{case_name}")
        plain, fused = (
            velocities(folder, case, fixtures, ops, torch.bfloat16, **precision)
            for ops in (device_ops("cuda"), fused_ops("cuda"))
        )
        for got, expected in zip(fused, plain, strict=True):
            assert got.dtype == torch.bfloat16 and relative_error(got, expected) <= bound
