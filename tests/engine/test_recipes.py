"""The shipped recipes: their numbers are the published ones, and each of them renders."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs.entry import RenderJob, compose_job, compose_recipes
from tests.engine.pictures import planes_of

LTX_2 = (
    "distilled_two_stage",
    "distilled_two_stage_short",
    "draft",
    "full_two_stage",
    "full_two_stage_hq",
    "one_stage",
)


@pytest.fixture(scope="module")
def recipes():
    """Every recipe, for the nano model."""
    return compose_recipes("render", []).usable


def composed(name, model):
    return compose_job(RenderJob, "render", [f"recipe={name}", f"model={model}"]).recipe


def scales(stream):
    return {"cfg_scale": stream.cfg, "stg_scale": stream.stg, "rescale_scale": stream.rescale,
            "modality_scale": stream.modality}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "model", "published"),
    [
        ("one_stage", "ltx2_19b_dev", "ltx2_0"),
        ("full_two_stage", "ltx2_19b_dev", "ltx2_0"),
        ("full_two_stage", "ltx2_19b_dev_fp8", "ltx2_0"),
        ("one_stage", "ltx2_3_22b_dev", "ltx2_3"),
        ("full_two_stage", "ltx2_3_22b_dev", "ltx2_3"),
        ("full_two_stage_hq", "ltx2_3_22b_dev", "ltx2_3_hq"),
    ],
)
def test_guidance_of_a_recipe_is_the_published_one(golden, recipe, model, published):
    expected = golden("schedulers/case_guidance").params["defaults"][published]
    stage = composed(recipe, model).stages[0]
    assert len(stage.levels(1)) - 1 == expected["num_inference_steps"]
    for name in ("video", "audio"):
        given = {key: value for key, value in expected[name].items() if key not in ("stg_blocks", "skip_step")}
        assert scales(getattr(stage.guidance[0], name)) == given
        assert stage.guidance[0].stg_blocks == expected[name]["stg_blocks"]


def test_distilled_levels_are_the_published_ones(golden, recipes):
    case = golden("schedulers/case_sigmas")
    first, second = recipes["distilled_two_stage"].stages
    torch.testing.assert_close(torch.tensor(first.sigmas), case["out.distilled_stage1"])
    torch.testing.assert_close(torch.tensor(second.sigmas), case["out.distilled_stage2"])
    for name in ("full_two_stage", "full_two_stage_hq"):
        refine = recipes[name].stages[1]
        assert (refine.sigmas, refine.adapter, refine.guidance) == (second.sigmas, "distilled", [])


def test_ltx_videos_distilled_numbers_are_the_published_ones(golden):
    expected = golden("e2e_ltxv_0_9_8/case_multi_scale_distilled_t2v").params
    recipe = composed("ltxv_multi_scale_distilled", "ltxv_13b_distilled")
    assert [stage.sigmas[:-1] for stage in recipe.stages] == [
        expected["first_pass"]["timesteps"],
        expected["second_pass"]["timesteps"],
    ]
    assert recipe.stages[0].size_factor == expected["downscale_factor"]
    assert recipe.decode.timestep == expected["decode_timestep"]
    assert recipe.decode.noise_scale == expected["decode_noise_scale"]
    assert recipe.decode.tone_map == 0.6
    assert composed("ltxv_multi_scale_distilled", "ltxv_2b_distilled").decode.tone_map == 0, "the 13B's alone"


def test_ltx_videos_dev_steps_are_27_and_13_of_30(recipes):
    recipe = recipes["ltxv_multi_scale_dev"]
    first, second = (stage.levels(6000) for stage in recipe.stages)
    assert (len(first) - 1, len(second) - 1) == (27, 13)
    # Without guidance at the very beginning, with all of it soon after, with little at the end.
    passes = [recipe.stages[0].guidance_at(sigma).passes(has_audio=False) for sigma in (1.0, 0.99, 0.98, 0.7)]
    assert [len(each) for each in passes] == [1, 3, 3, 2]


@pytest.mark.parametrize("name", LTX_2)
def test_recipe_renders_on_the_nano_model(engine, recipes, request_for, tmp_path, name):
    path = tmp_path / "distilled.safetensors"
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(1, 64), f"{layer}.lora_B.weight": torch.ones(64, 1)}, path)
    recipe = recipes[name]
    request = request_for(width=126, height=128, grid_px=recipe.grid_px)
    with_adapter = dataclasses.replace(engine, adapter_files={"distilled": str(path)})
    streams = with_adapter.render(request, recipe, lambda stage: None)
    frames = planes_of(streams.frames)
    assert frames.shape == (9, 128 * 3 // 2, 126) and frames.std() > 1
    assert np.isfinite(streams.waveform).all()


def test_every_recipe_is_proven_here_or_with_ltx_video(recipes):
    assert set(recipes) == {*LTX_2, "ltxv_multi_scale_dev", "ltxv_multi_scale_distilled", "ltxv_one_pass"}
