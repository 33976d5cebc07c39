"""The denoiser computes what the official releases computed for the same weights and inputs (float32, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import reference_ops
from kernels.reference import rows_of_tokens
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.rope import RotaryTable
from pipeline.model.state import StreamState, settled

# Largest error over largest value. The recorded tolerance is 1e-4; torch 2.13 gives 6e-7 here and torch 2.11 on another
# processor 2.4e-6, while a float32 frequency grid (4.5e-5) or diffusers' gate rule (6e-2) fails this bound.
OUTPUT_BOUND = 5e-6
# Values on the way there; rotary tables are compared absolutely.
ROTARY_BOUND = 1e-5

LTX_2_CASES = ["frozen_audio", "i2v", "masked", "stg", "t2v", "video_only"]
LTX_VIDEO_CASES = ["i2v", "t2v"] + [
    f"stg_{strategy}" for strategy in ("attentionskip", "attentionvalues", "residual", "transformerblock")
]
CASES = {
    "dit_ltx2_0": [*LTX_2_CASES, "audio_only"],
    "dit_ltx2_0_fp8": ["t2v"],
    "dit_ltx2_0_video_model": ["t2v"],
    "dit_ltx2_3": LTX_2_CASES,
    "dit_ltx2_3_fp8": ["t2v"],
    "dit_ltx2_5": ["i2v", "t2v"],
    "dit_ltxv_0_9_8_2b": LTX_VIDEO_CASES,
    "dit_ltxv_0_9_8_13b": LTX_VIDEO_CASES,
}
WITH_EVERY_BLOCK = ["dit_ltx2_0", "dit_ltx2_0_video_model", "dit_ltx2_3", "dit_ltx2_5"]
LTX_VIDEO = ["dit_ltxv_0_9_8_2b", "dit_ltxv_0_9_8_13b"]

Golden = Callable[[str], Any]
Load = Callable[[str], AudioVideoDenoiser]


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("folder", "case_name"), [(folder, name) for folder in CASES for name in CASES[folder]])
def test_velocities_are_those_of_the_official_model(
    folder: str, case_name: str, load: Load, golden: Golden, record_property: Callable[[str, object], None]
) -> None:
    case = golden(f"{folder}/case_{case_name}")
    denoiser = load(folder)
    velocities = denoiser(case.video, case.audio, perturbations=case.perturbations)
    names = {"video": "out.velocity" if "ltxv" in folder else "out.video", "audio": "out.audio"}
    assert {names[n] for n, v in zip(names, velocities, strict=True) if v is not None} == {
        key for key in case.tensors if key.startswith("out.")
    }
    for name, velocity in zip(names, velocities, strict=True):
        if velocity is not None:
            error = relative_error(velocity, case[names[name]])
            record_property(f"{name} error", f"{error:.1e}")
            assert error <= OUTPUT_BOUND


def test_video_only_kind_of_model_needs_no_audio_weights(video_only_denoiser: AudioVideoDenoiser) -> None:
    assert not [name for name in video_only_denoiser.state_dict() if "audio" in name or "exchange" in name]


@pytest.mark.parametrize("folder", [*WITH_EVERY_BLOCK, *LTX_VIDEO])
def test_every_block_yields_the_official_tokens(folder: str, load: Load, golden: Golden) -> None:
    denoiser, case = load(folder), golden(f"{folder}/case_t2v")
    outputs = []
    handles = [block.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for block in denoiser.blocks]
    denoiser(case.video, case.audio)
    for handle in handles:
        handle.remove()
    compared = 0
    for index, states in enumerate(outputs):
        for name, state in zip(("video", "audio"), states, strict=True):
            if state is not None:
                key = f"mid.block.{index}" if folder in LTX_VIDEO else f"mid.block.{index}.{name}"
                assert relative_error(settled(state, reference_ops()).x_BTD, case[key]) <= OUTPUT_BOUND
                compared += 1
    assert compared == sum(key.startswith("mid.block.") for key in case.tensors)


@pytest.mark.parametrize("folder", WITH_EVERY_BLOCK)
def test_what_the_first_block_is_given_is_official(folder: str, load: Load, golden: Golden) -> None:
    denoiser, case = load(folder), golden(f"{folder}/case_t2v")
    given = []
    handle = denoiser.blocks[0].register_forward_pre_hook(lambda _m, args: given.append(args))
    denoiser(case.video, case.audio)
    handle.remove()
    compared = 0
    for name, state in zip(("video", "audio"), given[0][:2], strict=True):
        for key, value in _inputs_of_first_block(state).items():
            expected = case[f"mid.pre.{name}.{key}"]
            if "rope" in key:
                assert value.shape == expected.shape
                assert (value - expected).abs().max() <= ROTARY_BOUND, key
            else:
                assert relative_error(value.expand_as(expected), expected) <= OUTPUT_BOUND, key
            compared += 1
    unused_here = 0 if case.audio is not None else len(_exchange_keys(case.tensors))
    assert compared == sum(key.startswith("mid.pre.") for key in case.tensors) - unused_here


def _exchange_keys(expected: dict[str, Tensor]) -> list[str]:
    return [key for key in expected if key.startswith("mid.pre.") and ".cross_" in key]


def _inputs_of_first_block(state: StreamState | None) -> dict[str, Tensor]:
    """Under the names of the recording, modulation gathered for each token."""
    if state is None:
        return {}
    modulation, conditioning = state.modulation, state.conditioning
    index_BT = modulation.index_BT
    values = {
        "x": state.x_BTD,
        "context": conditioning.text_BSD,
        "timesteps": rows_of_tokens(modulation.rows_BKRD.flatten(2), index_BT),
        "embedded_timestep": rows_of_tokens(modulation.embedded_BKD, index_BT),
        "rope_cos": conditioning.rotary.cos_BHTP,
        "rope_sin": conditioning.rotary.sin_BHTP,
    }
    if modulation.text_rows_B12D is not None:
        values["prompt_timestep"] = modulation.text_rows_B12D.flatten(2)
    if modulation.exchange is not None and conditioning.exchange_rotary is not None:
        exchange = modulation.exchange
        values["cross_gate"] = rows_of_tokens(exchange.gate_BKD, exchange.gate_index_BT)
        values["cross_scale_shift"] = rows_of_tokens(exchange.rows_BK4D.flatten(2), exchange.rows_index_BT)
        values["cross_rope_cos"] = conditioning.exchange_rotary.cos_BHTP
        values["cross_rope_sin"] = conditioning.exchange_rotary.sin_BHTP
    return values


@pytest.mark.parametrize("folder", LTX_VIDEO)
def test_rotary_table_of_ltx_video_is_official(folder: str, load: Load, golden: Golden) -> None:
    denoiser, case = load(folder), golden(f"{folder}/case_t2v")
    table: RotaryTable = denoiser.prepare(case.video, None).video.rotary
    for ours_BHTP, key in ((table.cos_BHTP, "mid.rope_cos"), (table.sin_BHTP, "mid.rope_sin")):
        # Recorded once for each of the two channels of a pair, all heads side by side.
        theirs_BTD = ours_BHTP.repeat_interleave(2, dim=-1).transpose(1, 2).flatten(2)
        assert theirs_BTD.shape == case[key].shape
        assert (theirs_BTD - case[key]).abs().max() <= ROTARY_BOUND


def test_bfloat16_weights_stay_close_to_float32_even_under_masks(
    av_denoiser: AudioVideoDenoiser, golden: Golden
) -> None:
    case = golden("dit_ltx2_0/case_masked")
    half = _copy_in_bfloat16(av_denoiser)
    for got, name in zip(half(case.video, case.audio), ("video", "audio"), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got.float(), case[f"out.{name}"]) <= 3e-2


def _copy_in_bfloat16(denoiser: AudioVideoDenoiser) -> AudioVideoDenoiser:
    copy = AudioVideoDenoiser(denoiser.hparams, denoiser.blocks[0].video.ops).bfloat16()
    copy.load_state_dict(denoiser.state_dict())
    return copy
