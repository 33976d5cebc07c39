"""Mistakes that a denoiser is easily written with, each made on purpose: the golden numbers must find it.

Numbers are those of the list in the golden data's README. That the right way passes is in `test_golden_cases.py`; here
each altered denoiser must miss the same numbers by more than the bound there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.ops import OpSet, reference_ops
from pipeline.model import denoiser as denoiser_module
from pipeline.model.block import Exchange, StreamLayers
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.hparams import RotaryHparams
from pipeline.model.state import settled
from pipeline.model.streams import Perturbation, text_bias

# The bound that the right way meets with 6e-7. The smallest of these mistakes, a float64 grid for LTX-Video, costs
# 1.2e-5 at these sizes, a float32 grid for LTX-2 4.5e-5, most of them more than 1e-2.
MISSED = 5e-6
LTX_2_GRID = RotaryHparams(theta=10000.0)
LTX_VIDEO_GRID = RotaryHparams(theta=10000.0, interleaved=True, at_start=True, float64_grid=False)


class Mistake(NamedTuple):
    """What is done wrong and where it shows: operations and hyper-parameters to replace, a change to make, a case."""

    case: str
    ops: dict[str, Callable[..., Tensor]] = {}  # noqa: RUF012
    hparams: dict[str, Any] = {}  # noqa: RUF012
    change: Callable[[AudioVideoDenoiser, pytest.MonkeyPatch], None] | None = None


def norm_per_head(x: Tensor, weight: Tensor, rotary: Any, num_heads: int, eps: float) -> Tensor:
    per_head = functional.rms_norm(x.unflatten(-1, (num_heads, -1)), (x.shape[-1] // num_heads,), eps=eps).flatten(-2)
    return reference.qk_norm_rope(per_head, weight, rotary, num_heads, 0.0)


def with_rows(owner: type, table: str, order: list[int]) -> Callable[[AudioVideoDenoiser, Any], None]:
    """Takes the rows of a table, and those computed for it, in another order."""

    def change(denoiser: AudioVideoDenoiser, patch: Any) -> None:
        for module in denoiser.modules():
            if isinstance(module, owner):
                setattr(module, table, torch.nn.Parameter(getattr(module, table)[order]))

    return change


def audio_reads_updated_video(denoiser: AudioVideoDenoiser, patch: pytest.MonkeyPatch) -> None:
    forward = Exchange.forward

    def in_turn(self: Exchange, video: Any, audio: Any, skipped: Any, audio_lane: Any) -> Any:
        updated, _ = forward(self, video, audio, skipped, audio_lane)
        return updated, forward(self, updated, audio, skipped, audio_lane)[1]

    patch.setattr(Exchange, "forward", in_turn)


def mask_bias_of_diffusers(denoiser: AudioVideoDenoiser, patch: pytest.MonkeyPatch) -> None:
    def linear(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if mask is None else ((1 - mask) * -10000.0).to(dtype)[:, None]

    patch.setattr(denoiser_module, "attention_bias", linear)


def head_shift_after_silu(denoiser: AudioVideoDenoiser, patch: pytest.MonkeyPatch) -> None:
    project_out = denoiser_module.StreamEnds.project_out

    def late(self: Any, x: Tensor, modulation: Any) -> Tensor:
        return project_out(self, x, replace(modulation, embedded_BKD=functional.silu(modulation.embedded_BKD)))

    patch.setattr(denoiser_module.StreamEnds, "project_out", late)


def bias_from_somewhere(denoiser: AudioVideoDenoiser, patch: pytest.MonkeyPatch) -> None:
    layer = denoiser.blocks[0].video.feed_forward.narrow
    assert layer.bias is None
    layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), 0.1))


def no_marker(denoiser: AudioVideoDenoiser, patch: pytest.MonkeyPatch) -> None:
    denoiser.video.keyframe_marker = torch.nn.Parameter(torch.zeros_like(denoiser.video.keyframe_marker))


def skips_the_residual(denoiser: AudioVideoDenoiser, patch: pytest.MonkeyPatch) -> None:
    attend = StreamLayers.attend

    def without(self: Any, state: Any, values_only: Any, input_only: Any) -> Any:
        attended = settled(attend(self, state, False, input_only), self.ops)
        skipped = torch.zeros(4, dtype=torch.bool) if values_only is False else values_only
        return replace(attended, x_BTD=torch.where(skipped[:, None, None], state.x_BTD, attended.x_BTD))

    patch.setattr(StreamLayers, "attend", without)


def as_other_strategy(strategy: str) -> Callable[[AudioVideoDenoiser, Any], None]:
    def change(denoiser: AudioVideoDenoiser, patch: Any) -> None:
        forward = denoiser.forward
        patch.setattr(
            denoiser,
            "forward",
            lambda video, audio, perturbations: forward(
                video, audio, perturbations=[replace(p, strategy=strategy) for p in perturbations]
            ),
        )

    return change


MISTAKES = {
    "trap_01_gate_and_rows_by_the_others_noise_level": Mistake(
        "dit_ltx2_0/i2v", hparams={"exchange_timesteps": "1.0.0"}
    ),
    "trap_01_gate_and_rows_by_own_timesteps": Mistake("dit_ltx2_0/i2v", hparams={"exchange_timesteps": "first"}),
    "trap_01_in_2_3": Mistake("dit_ltx2_3/frozen_audio", hparams={"exchange_timesteps": "1.0.0"}),
    "trap_01_gate_timestep_not_multiplied": Mistake("dit_ltx2_0/t2v", hparams={"exchange_gate_timestep_scale": 1.0}),
    "trap_02_shift_first_in_the_exchange": Mistake(
        "dit_ltx2_0/t2v", change=with_rows(Exchange, "video_table", [1, 0, 3, 2, 4])
    ),
    "trap_02_scale_first_in_the_blocks": Mistake(
        "dit_ltx2_0/t2v", change=with_rows(StreamLayers, "table", [1, 0, 2, 4, 3, 5])
    ),
    "trap_02_scale_first_for_the_text": Mistake("dit_ltx2_3/t2v", change=with_rows(StreamLayers, "text_table", [1, 0])),
    "trap_02_text_rows_before_the_feed_forwards": Mistake(
        "dit_ltx2_3/t2v", change=with_rows(StreamLayers, "table", [0, 1, 2, 6, 7, 8, 3, 4, 5])
    ),
    "trap_03_audio_reads_video_after_its_update": Mistake("dit_ltx2_0/t2v", change=audio_reads_updated_video),
    "trap_04_interleaved_pairs": Mistake("dit_ltx2_0/t2v", hparams={"rotary": replace(LTX_2_GRID, interleaved=True)}),
    "trap_04_float32_grid": Mistake("dit_ltx2_0/t2v", hparams={"rotary": replace(LTX_2_GRID, float64_grid=False)}),
    "trap_04_positions_at_the_start": Mistake("dit_ltx2_3/t2v", hparams={"rotary": replace(LTX_2_GRID, at_start=True)}),
    "trap_05_norm_of_each_head": Mistake("dit_ltx2_0/t2v", ops={"qk_norm_rope": norm_per_head}),
    "trap_05_ltx_video_with_the_epsilon_of_ltx_2": Mistake("dit_ltxv_0_9_8_13b/t2v", hparams={"qk_norm_eps": 1e-6}),
    "trap_06_ltx_2_without_a_norm_before_text": Mistake("dit_ltx2_0/t2v", hparams={"text_query_norm": False}),
    "trap_06_ltx_video_with_one": Mistake("dit_ltxv_0_9_8_2b/t2v", hparams={"text_query_norm": True}),
    "trap_07_no_gate": Mistake("dit_ltx2_3/t2v", ops={"gate_heads": lambda x, logits: x}),
    "trap_07_gate_not_doubled": Mistake(
        "dit_ltx2_3/t2v", ops={"gate_heads": lambda x, logits: reference.gate_heads(x, logits) / 2}
    ),
    "trap_08_skipped_residual": Mistake("dit_ltx2_0/stg", change=skips_the_residual),
    "trap_08_in_2_3": Mistake("dit_ltx2_3/stg", change=skips_the_residual),
    "trap_09_rms_norm_in_the_head": Mistake(
        "dit_ltx2_0/t2v", ops={"modulated_layer_norm": reference.modulated_rms_norm}
    ),
    "trap_09_head_by_the_embedding_after_its_silu": Mistake("dit_ltx2_0/t2v", change=head_shift_after_silu),
    "trap_09_timestep_not_multiplied": Mistake("dit_ltx2_0/t2v", hparams={"timestep_scale": 1.0}),
    "trap_10_linear_mask": Mistake("dit_ltx2_0/masked", change=mask_bias_of_diffusers),
    "trap_11_exact_gelu": Mistake(
        "dit_ltx2_0/t2v", ops={"linear_gelu": lambda *layer: functional.gelu(functional.linear(*layer))}
    ),
    "trap_11_exact_gelu_in_the_text_projection": Mistake("dit_ltx2_0/t2v", ops={"gelu_tanh": functional.gelu}),
    "trap_11_bias_in_2_5": Mistake("dit_ltx2_5/t2v", change=bias_from_somewhere),
    "ltx_2_5_without_the_keyframe_marker": Mistake("dit_ltx2_5/t2v", change=no_marker),
    "trap_27_positions_in_the_middle": Mistake(
        "dit_ltxv_0_9_8_2b/t2v", hparams={"rotary": replace(LTX_VIDEO_GRID, at_start=False)}
    ),
    "trap_27_split_halves": Mistake(
        "dit_ltxv_0_9_8_2b/t2v", hparams={"rotary": replace(LTX_VIDEO_GRID, interleaved=False)}
    ),
    "trap_27_float64_grid": Mistake(
        "dit_ltxv_0_9_8_13b/t2v", hparams={"rotary": replace(LTX_VIDEO_GRID, float64_grid=True)}
    ),
} | {
    f"strategy_{right}_taken_for_{wrong}": Mistake(f"dit_ltxv_0_9_8_2b/stg_{right}", change=as_other_strategy(wrong))
    for right, wrong in (
        ("attentionvalues", "attention"),
        ("attentionskip", "values"),
        ("residual", "values"),
        ("transformerblock", "residual"),
    )
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found_by_the_golden_numbers(
    name: str,
    load_altered: Callable[..., AudioVideoDenoiser],
    golden: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    mistake = MISTAKES[name]
    folder, case_name = mistake.case.split("/")
    case = golden(f"{folder}/case_{case_name}")
    ops: OpSet = replace(reference_ops(), **mistake.ops)
    denoiser = load_altered(folder, ops, **mistake.hparams)
    if mistake.change is not None:
        mistake.change(denoiser, monkeypatch)
    errors = []
    for got, key in zip(
        denoiser(case.video, case.audio, perturbations=case.perturbations), ("video", "audio"), strict=True
    ):
        if got is not None:
            expected = case["out.velocity" if "ltxv" in folder else f"out.{key}"]
            errors.append(((got - expected).abs().max() / expected.abs().max()).item())
    record_property("error", f"{max(errors):.1e}")
    assert max(errors) > MISSED


def test_trap_28_hidden_text_of_ltx_video_still_counts_where_all_of_it_is_hidden(
    load_altered: Callable[..., AudioVideoDenoiser], golden: Callable[[str], Any]
) -> None:
    # -10000 for every token is no mask at all, but for the few bits it costs; the most negative number evens all out.
    case = golden("dit_ltxv_0_9_8_2b/case_t2v")
    hidden = replace(case.video, text_mask_BS=torch.zeros_like(case.video.text_mask_BS))
    unmasked = replace(case.video, text_mask_BS=None)
    ours, even = load_altered("dit_ltxv_0_9_8_2b"), load_altered("dit_ltxv_0_9_8_2b", hidden_text_bias=None)
    expected, _ = ours(unmasked, None)
    assert (ours(hidden, None)[0] - expected).abs().max() < 1e-2 * expected.abs().max()
    assert (even(hidden, None)[0] - expected).abs().max() > 5e-2 * expected.abs().max()
    assert text_bias(torch.tensor([[1.0, 0.0]]), torch.float32, -10000.0).flatten().tolist() == [0.0, -10000.0]


def test_keyframes_must_be_named_for_a_model_that_marks_them(
    load: Callable[[str], AudioVideoDenoiser], golden: Callable[[str], Any]
) -> None:
    case = golden("dit_ltx2_5/case_i2v")
    with pytest.raises(ValueError, match="keyframes_mask_BT must be given"):
        load("dit_ltx2_5")(replace(case.video, keyframes_mask_BT=None), case.audio)


def test_strategies_of_ltx_video_are_refused_with_audio(
    av_denoiser: AudioVideoDenoiser, golden: Callable[[str], Any]
) -> None:
    case = golden("dit_ltx2_0/case_i2v")
    with pytest.raises(ValueError, match=r"must have the strategy 'values', got \['block'\]"):
        av_denoiser(case.video, case.audio, perturbations=[Perturbation(frozenset({0}), strategy="block")])
