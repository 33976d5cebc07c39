"""Composition: what is refused, in one line, and what a path key may hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import entry
from jobs.entry import RenderJob, compose_job, compose_recipes
from pipeline.config.tree import to_plain
from pipeline.errors import UsageError
from pipeline.planning.plan import recipe_content


def refused(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        compose_job(RenderJob, "render", list(arguments))
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("manifst=x", "did you mean manifest?"),
        ("recipe.encode.preset=fastest", "recipe.encode.preset must be one of ultrafast"),
        ("recipe.encode.x264_threads=0", "x264_threads must be 1 or more, got 0"),
        ("recipe.stages=[]", "recipe.stages must be one stage or more"),
        ("recipe.stages=[{sigmas:[1.0,0.0],sampler:magic}]", "recipe.stages.sampler must be one of euler, euler_anc"),
        ("recipe.stages=[{sigmas:[0.5,0.7,0.0]}]", "two or more descending levels"),
        ("recipe.stages=[{sigmas:[1.0,0.0],schedule:{num_steps:3}}]", "sigmas must be empty beside a schedule"),
        ("recipe.stages=[{size_factor:0.5,sigmas:[1.0,0.0]}]", "must be at the rendered size, got 0.5"),
        ("recipe.stages=[{size_factor:0,sigmas:[1.0,0.0]}]", "size_factor must be above 0, at most 1, got 0"),
        ("recipe.stages=[{upsample:3,sigmas:[1.0,0.0]}]", "upsample must be 1.0 or 2.0, got 3"),
        ("recipe.stages=[{upsample:2,sigmas:[1.0,0.0]}]", "the first of recipe.stages must be without upsample"),
        ("recipe.stages=[{sigmas:[1.0,0.0]},{size_factor:0.5,sigmas:[1.0,0.0]}]", "must be without size_factor"),
        ("recipe.stages=[{sigmas:[1.0,0.0],eta:2}]", "eta must be between 0 and 1, got 2"),
        ("recipe.stages=[{sigmas:[1.0,0.0],family:sd}]", "family must be ltx2 or ltx_video, got 'sd'"),
        ("recipe.stages=[{sigmas:[1.0,0.0],stg_strategy:all}]", "stg_strategy must be one of values, attention"),
        ("recipe.stages=[{sigmas:[1.0,0.0],stg_strategy:block}]", "stg_strategy must be values in a stage of LTX-2"),
        ("recipe.stages=[{sigmas:[1.0,0.0],sampler:euler_cfg_pp}]", "another one in a stage without cfg"),
        ("recipe.stages=[{sigmas:[1.0,0.0],guidance:[{video:{stg:1.0}}]}]", "stg_blocks must be one block or more"),
        ("recipe.stages=[{sigmas:[1.0,0.0],guidance:[{video:{cfg:-1}}]}]", "guidance.cfg must be a finite number"),
        ("recipe.stages=[{sigmas:[1.0,0.0],guidance:[{},{down_to:0.5}]}]", "in order of falling down_to"),
        ("recipe.sound_from_stage=3", "sound_from_stage must be the number of a stage, got 3; use 1 to 2"),
        ("recipe.decode.tone_map=2", "recipe.decode.tone_map must be between 0 and 1, got 2"),
        ("recipe.clip.num_frames=24", "clip.num_frames must be 8k+1, got 24"),
        ("model.clip.width=63", "clip.width must be even and at least 2, got 63"),
        ("recipe.clip.fps=nan", "clip.fps must be between 1 and 240, got nan"),
        ("limit=-1", "limit must be 0 or more, got -1"),
        ("budget_usd=nan", "budget_usd must be a number of dollars"),
        ("parallel=ulysses2", "parallel must be single or auto in one process, got ulysses2; use cluster=local"),
        ("parallel.ulysses=0", "parallel.ulysses must be 1 or more, got 0"),
        ("cluster.gpus_per_node=0", "cluster.gpus_per_node must be 1 or more, got 0"),
        ("cluster.assumed_link_gb_per_s=0", "cluster.assumed_link_gb_per_s must be above 0"),
        ("cluster.graph_below_tokens=-1", "cluster.graph_below_tokens must be 0 or more, got -1"),
        ("precision.kernels=fastest", "precision.kernels must be fused or reference"),
        ("precision.attention=sparse", "precision.attention must be exact or block_sparse, got 'sparse'"),
        ("precision.attention_density=0.2", "attention_density must be between 0.25 and 1, got 0.2"),
        ("precision.dense_above_level=1.5", "dense_above_level must be a noise level, 0 to 1, got 1.5"),
        ("precision.dense_first_layers=-1", "dense_first_layers must be 0 or more, got -1"),
        ("precision.step_cache_threshold=1", "step_cache_threshold must be from 0 to below 1, got 1"),
        ("cluster.device=tpu", "cluster.device must be auto, cpu or cuda, got 'tpu'"),
        ("pricing.gpu.observed_at=may", "observed_at must be a date, got 'may'"),
        ("ids=a", "ids must be a list like [a,b], got 'a'"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(argument: str, message: str) -> None:
    text = refused(argument)
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=ltx2_19b_distilled", "parallel.ulysses=3"], "divide the model's 32 heads, got 3; use one of [1, 2, 4"),
        (["parallel=ulysses8"], "must divide the model's 4 heads, got 8; use one of [1, 2, 4]"),
        (["parallel=tensor4", "parallel.ulysses=2"], "must divide the model's 4 heads, got 8"),
        (["parallel=guidance2"], "parallel.guidance must be at most the predictions of a step, got 2 for recipe "
                                 "distilled_two_stage; use 1"),
        (["parallel.guidance=8", "recipe=full_two_stage"], "got 8 for recipe full_two_stage; use 1 to 4"),
        (["parallel=ulysses4", "cluster.gpus_per_node=2"], "must fit one node, got ulysses4 of 4 GPUs for nodes of 2"),
        (["parallel=auto", "parallel.tensor=2"], "parallel.auto must be false beside degrees, got tensor2"),
        (["parallel=ring2", "precision=fast"], "parallel.ring must be 1 with precision.attention=block_sparse, got 2"),
        (["parallel=tensor2", "precision.step_cache_threshold=0.1"], "split guidance only with "
                                                                    "precision.step_cache_threshold, got tensor2"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_what_can(arguments: list[str], message: str) -> None:
    text = refused("cluster=local", *arguments)
    assert message in text and "\n" not in text


def test_8_bit_products_of_float32_are_refused() -> None:
    message = "precision.dtype must be checkpoint or bfloat16 with fp8, got 'float32'"
    assert message in refused("precision=fp8", "precision.dtype=float32")


def test_paths_are_taken_as_they_stand() -> None:
    odd = "/data/date=2026-11-20/a b/${x}/{1,2}/%20.parquet"
    job = compose_job(RenderJob, "render", [f"manifest={odd}", f"model.spatial_upscaler={odd}"])
    assert job.manifest == odd
    assert job.model.spatial_upscaler == odd


def test_the_recipe_takes_its_clip_from_the_model() -> None:
    assert compose_job(RenderJob, "render", []).recipe.clip.width == 192
    assert compose_job(RenderJob, "render", ["model=ltx2_19b_distilled"]).recipe.clip.width == 1536


def test_a_group_member_and_a_setting_compose() -> None:
    job = compose_job(RenderJob, "render", ["pricing=lambda_h100", "recipe.encode.crf=23"])
    assert (job.pricing.gpu.node_usd_per_hour, job.recipe.encode.crf) == (31.92, 23)
    assert to_plain(job)["recipe"] == to_plain(job.recipe)


@pytest.fixture
def recipe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`conf/recipe/` of a copy that a test may write into."""
    copy = tmp_path / "conf"
    for source in entry.CONF.rglob("*.yaml"):
        target = copy / source.relative_to(entry.CONF)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    monkeypatch.setattr(entry, "CONF", copy)
    return copy / "recipe"


def test_a_recipe_file_that_says_another_name_is_refused(recipe_files: Path) -> None:
    """Else a copied recipe would be estimated and rendered as the one it was copied from."""
    (recipe_files / "fast.yaml").write_text((recipe_files / "distilled_two_stage.yaml").read_text())
    with pytest.raises(UsageError, match=r"conf/recipe/fast.yaml must say name: fast, got 'distilled_two_stage'"):
        compose_recipes("render", [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: [fast", "while parsing a flow sequence"),
        ("- name: fast", "must be keys and values, got a list"),
        ("name: fast\nstags: []", "stags: Key 'stags' not in 'RecipeConfig'"),
        ("name: fast\ndefaults: [nothing]", "Could not load 'recipe/nothing'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_in_one_line(recipe_files: Path, text: str, reason: str) -> None:
    (recipe_files / "fast.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"^conf/recipe/fast.yaml must be") as caught:
        compose_recipes("render", [])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_file_of_the_jobs_own_recipe_is_refused_in_one_line(recipe_files: Path) -> None:
    (recipe_files / "distilled_two_stage.yaml").write_text("name: [")
    assert "distilled_two_stage.yaml" in refused() and "\n" not in refused()


def test_a_recipe_may_be_made_of_another_by_a_list_of_defaults(recipe_files: Path) -> None:
    text = "defaults: [one_stage, _self_]\nname: mine\nnegative_prompt: fog\n"
    (recipe_files / "mine.yaml").write_text(text)
    recipes = compose_recipes("render", ["recipe=draft", "recipe.encode.crf=23"]).usable
    assert (recipes["mine"].negative_prompt, recipes["mine"].encode.crf) == ("fog", 23)
    assert recipes["mine"].stages == recipes["one_stage"].stages


def test_a_path_that_no_override_grammar_takes_is_no_trouble() -> None:
    odd = ["model.adapters.distilled=/tmp/a (1).safetensors", "model.folder=/a b/(c)"]
    assert compose_job(RenderJob, "render", odd).model.adapters == {"distilled": "/tmp/a (1).safetensors"}
    assert not compose_recipes("render", odd).unusable


def test_a_setting_that_another_recipe_cannot_take_leaves_that_one_unusable() -> None:
    arguments = ["recipe=full_two_stage", "recipe.sound_from_stage=2"]
    assert compose_job(RenderJob, "render", arguments).recipe.sound_from_stage == 2
    recipes = compose_recipes("render", arguments)
    assert set(recipes.unusable) == {"draft", "one_stage", "ltxv_one_pass"}
    assert recipes.unusable["draft"].startswith("recipe.sound_from_stage must be the number of a stage, got 2; use 1")
    assert recipes.usable["distilled_two_stage"].sound_from_stage == 2


def test_a_recipe_is_not_renamed() -> None:
    with pytest.raises(UsageError, match=r"recipe\.name must be left alone"):
        compose_recipes("render", ["recipe.name=mine"])


def test_help_shows_settings_as_the_arguments_make_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        compose_job(RenderJob, "render", ["model=ltx2_19b_distilled", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "model.name=ltx2_19b_distilled" in text and "recipe: distilled_two_stage" in text


def test_ids_are_taken_as_they_stand() -> None:
    """Hydra would read 1_0 as 10, 1e3 as 1000.0 and true as True: other rows, or none."""
    job = compose_job(RenderJob, "render", ['ids=[1_0, 1e3,true,"a,b",${x},007]', "run_id=1e3"])
    assert job.ids == ["1_0", "1e3", "true", "a,b", "${x}", "007"]
    assert job.run_id == "1e3"


def test_guided_recipes_take_what_differs_between_models_from_the_model() -> None:
    recipe = compose_job(RenderJob, "render", ["recipe=one_stage"]).recipe
    schedule = recipe.stages[0].schedule
    assert schedule is not None and schedule.num_steps == 4
    assert recipe.stages[0].guidance[0].stg_blocks == [1]
    assert recipe.has_guidance and recipe.grid_px == 32


def test_every_recipes_content_can_be_hashed() -> None:
    recipes = compose_recipes("render", []).usable
    assert len(recipes) >= 9
    for recipe in recipes.values():
        json.dumps(recipe_content(recipe), allow_nan=False)
