"""Measurements are fair: one set of weights for all, outputs compared first, no time that cannot be."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.entry import RenderJob, compose_job
from kernels.ops import device_ops, fused_ops
from pipeline.bench import attention, ceilings, decode, peers, step, timing
from pipeline.bench.ceilings import Ceilings, judged
from pipeline.bench.decode import WAYS, measure_decodes, ways_named
from pipeline.bench.peers import PEERS
from pipeline.bench.step import KNOWN, chosen, measure_steps
from pipeline.bench.tiers import (
    ABLATIONS,
    EXACT,
    FAST,
    FP8,
    GRAPHED,
    PLAIN,
    TIERS,
    Built,
    Case,
    Contestant,
    Step,
    Weights,
    sparse_tier,
    tier,
)
from pipeline.config.model import DenoiserSize, ModelConfig
from pipeline.engine.nano import CONFIG
from pipeline.errors import UsageError
from pipeline.geometry import LatentShape, PixelShape, latent_shape
from pipeline.model.checkpoint import build_on_meta, name_on_disk
from pipeline.model.hparams import DenoiserHparams
from pipeline.planning.estimate import denoiser_flops

PUBLISHED = Path(__file__).resolve().parents[2] / "conf" / "published"
NANO = ModelConfig(size=DenoiserSize(2, 64, 32, 128))
SHAPES = {"64x64x9": latent_shape(PixelShape(9, 64, 64, 24.0))}
LTX_VIDEO = {
    "_class_name": "Transformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
    "attention_head_dim": 16, "caption_channels": 24, "cross_attention_dim": 32, "in_channels": 8,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "num_attention_heads": 2, "num_layers": 2, "out_channels": 8,
    "positional_embedding_max_pos": [20, 2048, 2048], "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope", "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
}  # fmt: skip
CEILINGS = Ceilings(1024, (0.7, 0.8), (1.4, 1.5), {"FLASH_ATTENTION": 0.3, "CUDNN_ATTENTION": 0.6}, "x", 4.2)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step, decode):
        monkeypatch.setattr(module, "measure_ceilings", lambda *given: CEILINGS)


def measured(*contestants: Contestant) -> dict[str, dict[str, Any]]:
    (row,) = measure_steps(CONFIG["transformer"], NANO, SHAPES, contestants, "cpu")
    return row["contestants"]


def times_a_step(factor: float, *, name: str = "off") -> Contestant:
    """Our step with its velocities multiplied."""

    def build(weights: Weights) -> Built:
        built = TIERS[0].build(weights)

        def bind(case: Case) -> Step:
            exact = built.bind(case)
            return lambda: tuple(factor * velocity for velocity in exact())

        return Built(built.module, bind)

    return Contestant(name, False, build)


def test_every_tier_and_peer_computes_the_plain_velocities_and_is_timed() -> None:
    facts = measured(*TIERS, PEERS[0])
    assert list(facts) == ["plain", "exact", "fp8", "fast", "diffusers"]
    for found in facts.values():
        assert 0 < found["min_s"] <= found["median_s"] <= found["max_s"] and len(found["all_s"]) >= 5
        tflops = denoiser_flops(NANO.size, SHAPES["64x64x9"]) / found["median_s"] / 1e12
        assert found["tflops"] == found["executed_tflops"] == pytest.approx(tflops), "so few tokens stay dense"
        assert found["percent_of_bf16_gemm"] == pytest.approx(100 * tflops / 0.8)
    assert facts["plain"]["difference"]["video"]["relative"] == 0
    assert 0 < facts["diffusers"]["difference"]["video"]["relative"] < 0.02
    assert 0.005 < facts["fp8"]["difference"]["audio"]["relative"] < 0.15


def test_replayed_tiers_are_named_only_and_on_a_cpu_are_the_tiers() -> None:
    assert [contestant.name for contestant in GRAPHED] == ["exact_graphed", "fp8_graphed", "fast_graphed"]
    assert not set(GRAPHED) & set(chosen(None)) and chosen(["exact_graphed"]) == GRAPHED[:1]
    facts = measured(TIERS[1], GRAPHED[0])
    assert facts["exact_graphed"]["capture_s"] is None
    assert facts["exact_graphed"]["difference"] == facts["exact"]["difference"]


def sparse_from_the_first_token(*, density: float = 0.3) -> Contestant:
    precision = replace(FAST, dense_below_tokens=0, attention_density=density)
    return sparse_tier(precision)


def test_the_fast_tier_is_the_shipped_one() -> None:
    assert compose_job(RenderJob, "render", ["precision=fast"]).precision == FAST
    assert TIERS[-1].name == "fast" and TIERS[-1].in_float8


def test_the_fast_tier_is_rated_by_what_it_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LatentShape(16, 10, 16, 10, 24.0)
    seconds = 1.0
    monkeypatch.setattr(step, "in_turns", lambda calls, device, turns: {name: [seconds] * 5 for name in calls})
    contestants = [TIERS[0], sparse_from_the_first_token()]
    (row,) = measure_steps(CONFIG["transformer"], NANO, {"512x320x121": shape}, contestants, "cpu")
    dense, fast = (row["contestants"][name] for name in ("plain", "fast"))
    # Of 20 blocks 14 are seen in both layers, and choosing them is 1/256 of the dense operations.
    spared = 2 * 4 * 64 * 2560**2 * (1 - 14 / 20 - 1 / 256) / 1e12
    assert fast["tflops"] == dense["tflops"] == dense["executed_tflops"]
    assert dense["tflops"] - fast["executed_tflops"] == pytest.approx(spared)
    assert fast["percent_of_fp8_gemm"] == pytest.approx(100 * fast["executed_tflops"] / 1.5)
    assert fast["floor_s"] == pytest.approx(fast["executed_tflops"] / 1.5)
    assert 0.02 < fast["difference"]["video"]["relative"] < 0.1


def test_the_fast_tier_computes_the_fp8_velocities_where_it_sees_all_keys() -> None:
    weights = Weights(CONFIG["transformer"], NANO, "cpu")
    case = weights.case(LatentShape(16, 10, 16, 10, 24.0))
    fp8 = tier("fp8", fused_ops, precision=FP8)
    with torch.inference_mode():
        velocities = [each.build(weights).bind(case)() for each in (sparse_from_the_first_token(density=1.0), fp8)]
        for got, wanted in zip(*velocities, strict=True):
            assert timing.difference(got, wanted)["relative"] < 0.02, "in the clip's own order"


def test_tokens_in_a_wrong_order_are_beyond_the_loosest_bound() -> None:
    weights = Weights(CONFIG["transformer"], NANO, "cpu")
    case = weights.case(LatentShape(16, 10, 16, 10, 24.0))
    with torch.inference_mode():
        video, _ = PLAIN.build(weights).bind(case)()
    assert timing.difference(video.flip(1), video)["relative"] > 2 * TIERS[-1].bound


def test_attention_over_blocks_is_timed_with_its_choice_and_its_error() -> None:
    found = attention.measure_attention(LatentShape(16, 10, 16, 1, 24.0), 4, 16, CEILINGS, "cpu")
    names = [f"block_sparse_attention_{density}" for density in (0.25, 0.3, 0.5, 1.0)]
    assert list(found) == ["self_attention", *names]
    dense, sparse, whole = (found[name] for name in ("self_attention", names[1], names[-1]))
    assert dense["fused"]["median_s"] > 0 and sparse["choice"]["median_s"] > 0
    assert sparse["seen_part"] == 14 / 20 and whole["seen_part"] == 1
    assert sparse["executed_tflops"] == pytest.approx(0.7 * sparse["tflops"])
    assert whole["difference"]["relative"] < 0.01 < sparse["difference"]["relative"] < 0.5


def test_without_the_library_attention_over_blocks_fails_and_dense_attention_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(ops: Any, device: str) -> Any:
        raise ImportError("No module named 'flash_attn'")

    monkeypatch.setattr(attention, "with_block_sparse_attention", missing)
    found = attention.measure_attention(LatentShape(2, 2, 2, 1, 24.0), 4, 16, CEILINGS, "cpu")
    assert found["self_attention"]["fused"]["median_s"] > 0
    assert found["block_sparse_attention_0.3"] == {"failure": "ImportError: No module named 'flash_attn'"}


@pytest.mark.parametrize("contestant", ABLATIONS, ids=lambda contestant: contestant.name)
def test_a_tier_without_one_thing_computes_what_it_does_with_it(contestant: Contestant) -> None:
    weights = Weights(CONFIG["transformer"], NANO, "cpu")
    whole = tier("whole", fused_ops, precision=FP8 if contestant.in_float8 else EXACT)
    case = weights.case(SHAPES["64x64x9"])
    with torch.inference_mode():
        for got, wanted in zip(*(each.build(weights).bind(case)() for each in (contestant, whole)), strict=True):
            assert timing.difference(got, wanted)["relative"] < 0.02


def test_the_peer_of_a_model_without_sound_computes_what_we_do() -> None:
    model = ModelConfig(family="ltx_video", size=DenoiserSize(2, 32, 0, 16))
    (row,) = measure_steps(LTX_VIDEO, model, SHAPES, [TIERS[0], PEERS[0]], "cpu")
    assert row["contestants"]["diffusers"]["difference"]["video"]["relative"] < 0.02
    assert row["contestants"]["diffusers"]["median_s"] > 0


def test_a_contestant_that_computes_something_else_is_not_timed() -> None:
    facts = measured(TIERS[0], times_a_step(1.2), times_a_step(float("nan"), name="nan"))
    assert "must be within 0.05 of the plain operations', got 0.2" in facts["off"]["not_comparable"]
    assert "got nan" in facts["nan"]["not_comparable"]
    assert "median_s" not in facts["off"] and "median_s" in facts["plain"]


def test_a_contestant_that_fails_is_reported_and_the_others_are_timed() -> None:
    def build(weights: Weights) -> Built:
        raise torch.OutOfMemoryError("no room\nfor it")

    def bind(case: Case) -> Step:
        raise RuntimeError("no such kernel")

    late = Contestant("late", False, lambda weights: Built(weights.plain, bind))
    facts = measured(Contestant("early", False, build), TIERS[0], late)
    assert facts["early"] == {"failure": "OutOfMemoryError: no room"}
    assert facts["late"] == {"failure": "RuntimeError: no such kernel"}
    assert facts["plain"]["median_s"] > 0


def test_a_time_below_the_count_at_the_ceiling_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "in_turns", lambda calls, device, turns: {name: [1e-9] * 5 for name in calls})
    facts = measured(TIERS[0])
    assert "must be at least" in facts["plain"]["error"]


def test_the_floor_is_at_the_best_rate_of_the_numbers_that_are_multiplied() -> None:
    assert CEILINGS.floor_s(0.8e12, in_float8=False) == pytest.approx(1.0)
    assert CEILINGS.floor_s(1.5e12, in_float8=True) == pytest.approx(1.0)
    better_attention = replace(CEILINGS, attention_tflops={"FLASH_ATTENTION": 2.0})
    assert better_attention.floor_s(2e12, in_float8=True) == pytest.approx(1.0)
    assert judged(1.0, 1.0) == {} and "got 0.9" in judged(0.9, 1.0)["error"]


def test_all_contestants_share_one_set_of_weights() -> None:
    weights = Weights(CONFIG["transformer"], NANO, "cpu")
    plain, fp8, again = (weights.denoiser(device_ops("cpu"), precision) for precision in (EXACT, FP8, FP8))
    ours = {tensor.data_ptr() for tensor in weights.plain.parameters()}
    assert {tensor.data_ptr() for tensor in plain.parameters()} == ours
    assert {tensor.data_ptr() for tensor in PEERS[0].build(weights).module.parameters()} == ours
    both = {tensor.data_ptr() for tensor in again.parameters()}
    assert {tensor.data_ptr() for tensor in fp8.parameters()} == both
    assert timing.num_bytes(fp8) < timing.num_bytes(plain)


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = timing.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, "cpu")
    a_turn = 1 + timing.TIMED_A_TURN
    assert "".join(order) == ("a" * a_turn + "b" * a_turn) * timing.TURNS
    assert all(len(found) == timing.TURNS * timing.TIMED_A_TURN >= 5 for found in times.values())


def test_a_call_is_timed_to_its_end() -> None:
    assert 0.02 <= timing.seconds_of(lambda: time.sleep(0.02), "cpu") < 5


def test_ceilings_are_measured_at_the_sizes_of_the_model() -> None:
    found = ceilings.measure_ceilings(8, 2, 16, "cpu")
    rates = (*found.bf16_gemm_tflops, *found.fp8_gemm_tflops, *found.attention_tflops.values(), found.copy_tb_per_s)
    assert found.num_tokens == 1024 and all(rate > 0 for rate in rates)
    assert found.default_attention in found.attention_tflops


def test_an_unknown_contestant_is_refused_with_the_known() -> None:
    with pytest.raises(UsageError, match=r"contestants must be of plain, exact, fp8, fast, diffusers.*got fastest"):
        chosen(["exact", "fastest"])
    assert [contestant.name for contestant in chosen(["fp8", "plain"])] == ["fp8", "plain"]
    assert len(KNOWN) == len(TIERS) + len(PEERS) + len(GRAPHED) + len(ABLATIONS)


def test_ways_of_decoding_are_chosen_beside_the_whole_which_they_are_compared_with() -> None:
    assert ways_named(None) == WAYS
    assert [way.name for way in ways_named(["tiled", "stream_8_channels_last_fused"])] == [
        "whole", "tiled", "stream_8_channels_last_fused",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"contestants must be of whole, whole_channels_last.*got stream_9, tild;"):
        ways_named(["tild", "whole", "stream_9"])


def test_only_the_ways_that_are_asked_for_are_decoded() -> None:
    ways = ways_named(["stream_2_channels_last_fused"])
    (row,) = measure_decodes(CONFIG, NANO, {"64x64x9": PixelShape(9, 64, 64, 24.0)}, ways, "cpu")
    assert list(row["contestants"]) == ["whole", "stream_2_channels_last_fused"]
    assert row["contestants"]["stream_2_channels_last_fused"]["mean_levels"] <= 1


def test_a_case_has_the_tokens_of_its_shape() -> None:
    case = Weights(CONFIG["transformer"], NANO, "cpu").case(LatentShape(2, 3, 4, 5, 24.0))
    assert case.video.tokens_BTC.shape == (1, 24, 16) and case.video.text_BSD.shape == (1, 128, 48)
    assert case.audio is not None and case.audio.tokens_BTC.shape == (1, 5, 32)


@pytest.mark.parametrize("name", ["ltx2_19b", "ltx2_3_22b", "ltxv_2b", "ltxv_13b"])
def test_the_peer_takes_every_tensor_of_a_published_denoiser(name: str) -> None:
    section = json.loads((PUBLISHED / f"{name}.json").read_text())["checkpoint"]["config"]["transformer"]
    hparams = DenoiserHparams.from_config(section, has_audio=name.startswith("ltx2"))
    ours = {
        name_on_disk(key): tensor.shape for key, tensor in build_on_meta(hparams, device_ops("cpu")).named_parameters()
    }
    theirs = peers.on_meta(section, hparams)
    assert {peers.published_name(key): tensor.shape for key, tensor in theirs.state_dict().items()} == ours
    assert {key for key, _ in theirs.named_buffers()} <= theirs.state_dict().keys(), (
        "a buffer would stay without values"
    )
