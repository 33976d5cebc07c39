"""Whole clips in one process: the customers' worker, with random weights, and what is said of its seconds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from jobs.entry import RenderJob, compose_job
from pipeline.bench import latency
from pipeline.bench.ceilings import Ceilings
from pipeline.bench.latency import KNOWN, LatencyPlan, chosen, measure_latency, require_possible
from pipeline.bench.random_parts import NoAdapters, draw_parts
from pipeline.bench.rows import Row
from pipeline.bench.tiers import FAST, Built, Contestant, Weights
from pipeline.bench.watched import _shown_instead
from pipeline.config.model import DenoiserSize, ModelConfig
from pipeline.config.recipe import RecipeConfig
from pipeline.engine.engine import Latents, RenderEngine
from pipeline.engine.nano import CONFIG, UPSCALER_CONFIG
from pipeline.errors import UsageError
from pipeline.geometry import PixelShape
from pipeline.media.natural_clip import natural_clip
from pipeline.media.probe import check_clip, probe_clip
from pipeline.records.frames import YuvFrames

NANO = ModelConfig(
    distilled=True, spatial_upscaler="drawn", size=DenoiserSize(2, 64, 32, 128, num_heads=4, num_audio_heads=4)
)
SHAPES = {"64x64x17": PixelShape(17, 64, 64, 24.0)}
CEILINGS = Ceilings(1024, (0.7, 0.8), (1.4, 1.5), {"FLASH_ATTENTION": 0.6}, "x", 4.2)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure_ceilings", lambda *given: CEILINGS)


@pytest.fixture
def plan(recipe: RecipeConfig) -> LatencyPlan:
    few_steps = [replace(stage, sigmas=stage.sigmas[-3:]) for stage in recipe.stages]
    return LatencyPlan(NANO, replace(recipe, stages=few_steps), chosen(None), repeats=2)


def measured(plan: LatencyPlan, folder: Path) -> Row:
    (row,) = measure_latency(CONFIG, UPSCALER_CONFIG, plan, SHAPES, folder, "cpu")
    return row


def luma_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]).astype(float)


def test_each_tier_renders_clips_of_both_kinds_through_the_worker(plan: LatencyPlan, tmp_path: Path) -> None:
    row = measured(plan, tmp_path)
    assert list(row["contestants"]) == ["exact", "fp8", "fast"] and row["repeats"] == {"natural": 2, "as_decoded": 1}
    videos = sorted((tmp_path / "64x64x17" / "videos").iterdir())
    commits = list((tmp_path / "64x64x17" / "commits").glob("*.json"))
    assert len(videos) == len(commits) == 3 * (1 + 2 + 1), "one untimed, and the timed ones; each was committed"
    for video in videos:
        check_clip(probe_clip(video), width=64, height=64, num_frames=17, fps=24.0, sample_rate_hz=24000)
    for facts in row["contestants"].values():
        assert facts["difference"]["video"]["relative"] < 0.2 and facts["again"]["video"]["relative"] == 0
        for found in facts["pictures"].values():
            for clip in found["clips"]:
                assert clip["denoise_s"] > 0 and clip["decode_s"] > 0
                assert clip["wall_s"] >= clip["denoise_s"] + clip["upsample_s"] + clip["decode_s"]
                # A file's time is the clock's at its last tick.
                assert clip["denoise_s"] < clip["closed_s"] <= clip["wall_s"] + 0.01
                assert clip["encode_s"] > 0 and clip["peak_gpu_memory_bytes"] is None
            assert found["real_time_factor"] == pytest.approx(17 / 24 / found["median_s"])
            assert found["size_bytes"] > 0
        seeds = [clip["seed"] for found in facts["pictures"].values() for clip in found["clips"]]
        assert len(set(seeds)) == 3, "nothing can be kept from one clip for another"
        assert facts["denoise_floor_s"] == pytest.approx(
            facts["denoise_executed_tflop"] / (0.8 if facts is row["contestants"]["exact"] else 1.5)
        )
        assert facts["floor_percent"] == pytest.approx(100 * facts["denoise_floor_s"] / facts["denoise_s"]["median_s"])


def test_the_encoder_gets_natural_pictures_or_those_that_were_decoded(plan: LatencyPlan, tmp_path: Path) -> None:
    row = measured(replace(plan, contestants=chosen(["exact"]), repeats=1), tmp_path)
    videos = tmp_path / "64x64x17" / "videos"
    natural, decoded = (luma_of(next(videos.glob(f"exact-{kind}-0.*"))) for kind in ("natural", "as_decoded"))
    wanted = np.concatenate([chunk.y for chunk in natural_clip(64, 64, 17)]).astype(float)
    # Gray from a decoder may be of full range: the same pictures but for a factor.
    assert np.corrcoef(natural.ravel(), wanted.ravel())[0, 1] > 0.98
    assert abs(np.corrcoef(decoded.ravel(), wanted.ravel())[0, 1]) < 0.2
    sizes = {kind: found["size_bytes"] for kind, found in row["contestants"]["exact"]["pictures"].items()}
    assert sizes["natural"] != sizes["as_decoded"]


def test_one_after_the_other_the_contestants_differ_as_they_do_beside_each_other(
    plan: LatencyPlan, tmp_path: Path
) -> None:
    plan = replace(plan, contestants=chosen(["fp8", "exact"]), repeats=1)
    beside, alone = measured(plan, tmp_path / "a"), measured(replace(plan, alone=True), tmp_path / "b")
    assert alone["alone"] and list(alone["contestants"]) == ["exact", "fp8"], "who is compared with comes first"
    for name, facts in beside["contestants"].items():
        assert alone["contestants"][name]["difference"] == facts["difference"]
    assert beside["contestants"]["fp8"]["difference"]["video"]["relative"] > 0.001


def test_without_the_exact_tier_nothing_is_compared(plan: LatencyPlan, tmp_path: Path) -> None:
    row = measured(replace(plan, contestants=chosen(["fp8"]), repeats=1), tmp_path)
    assert "difference" not in row["contestants"]["fp8"] and "pictures" in row["contestants"]["fp8"]


def test_sixteen_bit_numbers_that_only_the_eight_bit_ones_were_made_of_are_gone(
    plan: LatencyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    class Remembered(Weights):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            blocks: Any = self.plain.blocks
            drawn.extend(weakref.ref(block.video.self_attention.to_q.weight) for block in blocks)
            drawn.extend(block.video.self_attention.to_q.weight.data_ptr() for block in blocks)

    monkeypatch.setattr(latency, "Weights", Remembered)
    stand = latency._Stand(CONFIG, UPSCALER_CONFIG, plan, SHAPES["64x64x17"], YuvFrames(np.empty(0)), tmp_path, "cpu")
    ((entry,), _) = stand._entered(chosen(["fp8"]))
    gc.collect()
    first, second, first_place, second_place = drawn
    assert first() is None and second() is None
    denoiser: Any = entry.workers["natural"].renderer.engine.denoiser
    held = {tensor.data_ptr() for tensor in denoiser.parameters()}
    in_float8 = [block.video.feed_forward.in_float8 for block in denoiser.blocks]
    assert in_float8 == [True, True] or in_float8.count(True) >= 1
    assert [place in held for place in (first_place, second_place)] == [not each for each in in_float8]
    assert entry.held_bytes > sum(tensor.nbytes for tensor in denoiser.parameters())


def failing(at: str) -> Contestant:
    def build(weights: Weights) -> Built:
        if at == "build":
            raise ImportError("No module named 'flash_attn'\nmore")
        built = KNOWN["fp8"].build(weights)
        denoiser: Any = built.module

        def broken(*given: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        denoiser.prepare = broken
        return built

    return Contestant("fp8", True, build)


@pytest.mark.parametrize(
    ("at", "why"),
    [("build", "ImportError: No module named 'flash_attn'"), ("step", "EngineFault: OutOfMemory: a clip of")],
)
def test_a_contestant_that_fails_is_reported_and_the_others_are_timed(
    plan: LatencyPlan, tmp_path: Path, at: str, why: str
) -> None:
    row = measured(replace(plan, contestants=(KNOWN["exact"], failing(at)), repeats=1), tmp_path)
    assert row["contestants"]["fp8"]["failure"].startswith(why)
    assert "pictures" not in row["contestants"]["fp8"] and "pictures" in row["contestants"]["exact"]


def test_an_exact_tier_that_is_not_itself_again_is_an_error(
    plan: LatencyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = RenderEngine.sample
    factors = iter([1.0, 1.0, 1.001])

    def drifting(self: RenderEngine, *given: Any, **named: Any) -> Latents:
        latents = sample(self, *given, **named)
        return replace(latents, video_BCFHW=latents.video_BCFHW * next(factors))

    monkeypatch.setattr(RenderEngine, "sample", drifting)
    row = measured(replace(plan, contestants=chosen(["exact"]), repeats=1), tmp_path)
    assert "the same at each call" in row["contestants"]["exact"]["error"]


def test_denoising_below_its_floor_is_an_error(
    plan: LatencyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(CEILINGS, bf16_gemm_tflops=(1e-9, 1e-9), attention_tflops={"x": 1e-9})
    monkeypatch.setattr(latency, "measure_ceilings", lambda *given: slow)
    row = measured(replace(plan, contestants=chosen(["exact"]), repeats=1), tmp_path)
    assert "must be at least" in row["contestants"]["exact"]["error"]


def test_frames_shown_instead_come_in_the_decoders_chunks_and_close_it() -> None:
    is_closed = []

    def decoded() -> Iterator[YuvFrames]:
        try:
            for count in (2, 3):
                yield YuvFrames(np.zeros((count, 6, 4), np.uint8))
        finally:
            is_closed.append(True)

    pictures = YuvFrames(np.arange(5, dtype=np.uint8)[:, None, None].repeat(6, 1).repeat(4, 2))
    shown = list(_shown_instead(decoded(), pictures))
    assert [chunk.planes[:, 0, 0].tolist() for chunk in shown] == [[0, 1], [2, 3, 4]]
    left = _shown_instead(decoded(), pictures)
    next(left)
    left.close()
    assert is_closed == [True, True]


def test_the_tiers_are_the_shipped_ones() -> None:
    for name, precision in latency._PRECISIONS.items():
        shipped = compose_job(RenderJob, "render", [f"precision={name}"]).precision
        assert shipped == precision and KNOWN[name].in_float8 == (precision.linear == "fp8")
    assert latency._PRECISIONS.keys() == KNOWN.keys() and FAST.name in KNOWN


def test_what_random_weights_cannot_do_is_refused(recipe: RecipeConfig) -> None:
    with pytest.raises(UsageError, match="contestants must be of exact, fp8, fast, got fastest"):
        chosen(["exact", "fastest"])
    fusing = replace(recipe, stages=[replace(stage, adapter="detailer") for stage in recipe.stages])
    with pytest.raises(UsageError, match=r"needs adapters, and random weights have none \(detailer\)"):
        require_possible(fusing, replace(NANO, adapters={"detailer": "x"}), SHAPES)
    with pytest.raises(UsageError, match=r"needs model\.spatial_upscaler"):
        require_possible(recipe, replace(NANO, spatial_upscaler=""), SHAPES)
    with pytest.raises(UsageError, match="sides must be at least 64 pixels, got 64x32x9"):
        require_possible(recipe, NANO, SHAPES | {"64x32x9": PixelShape(9, 32, 64, 24.0)})
    with pytest.raises(UsageError, match="take no adapters"):
        NoAdapters().use([("x", 1.0)])
    NoAdapters().use([])


def test_a_bound_on_memory_needs_a_gpu(plan: LatencyPlan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gpu_memory_limit_gb must be left out on cpu, got 80"):
        measured(replace(plan, gpu_memory_limit_gb=80.0), tmp_path)


def test_given_embeddings_are_those_the_denoiser_takes_and_a_negative_prompt_has_others() -> None:
    parts = draw_parts(CONFIG, UPSCALER_CONFIG, NANO, "cpu")
    positive, negative = parts.text.encode_all("a boat", "blurry")
    assert positive.video_BSD.shape == (1, 128, 48) and positive.audio_BSD is not None
    assert not positive.video_BSD.equal(negative.video_BSD)
    assert parts.text.encode_all("a boat")[0] is positive
    assert not any(tensor.is_meta for tensor in parts.video_decoder.module.state_dict().values())
