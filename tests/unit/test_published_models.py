"""What conf/model says of a published model is what its file's metadata says, and its operations are counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jobs.entry import CONF, StageWeightsJob, compose_job, compose_recipes
from pipeline.config.model import ModelConfig
from pipeline.config.recipe import misfit

NAMES = sorted(path.stem for path in (CONF / "model").glob("ltx*.yaml"))
LTX2_DISTILLED = {"distilled_two_stage", "distilled_two_stage_short", "draft"}
LTX2_GUIDED = {"full_two_stage", "full_two_stage_hq", "one_stage"}
LTXV_GUIDED = {"ltxv_multi_scale_dev", "ltxv_one_pass"}
# The distilled models of LTX-2 have no distilled adapter to refine with; 28 layers have no block 28.
SUITING = {
    "ltx2_19b_dev": LTX2_GUIDED,
    "ltx2_19b_dev_fp8": LTX2_GUIDED,
    "ltx2_19b_distilled": LTX2_DISTILLED | {"one_stage"},
    "ltx2_19b_distilled_fp8": LTX2_DISTILLED | {"one_stage"},
    "ltx2_3_22b_dev": LTX2_GUIDED,
    "ltx2_3_22b_distilled": LTX2_DISTILLED | {"one_stage"},
    "ltxv_13b_dev": LTXV_GUIDED,
    "ltxv_13b_distilled": LTXV_GUIDED | {"ltxv_multi_scale_distilled"},
    "ltxv_2b_distilled": {"ltxv_one_pass", "ltxv_multi_scale_distilled"},
    "nano": LTX2_DISTILLED | LTX2_GUIDED,
}
PIXELS = 1920 * 1088 * 121


def model_named(name: str) -> ModelConfig:
    return compose_job(StageWeightsJob, "stage_weights", [f"model={name}"]).model


def described(name: str) -> dict[str, Any]:
    (path,) = [path for path in (CONF / "published").glob("ltx*.json") if name.startswith(path.stem)]
    return json.loads(path.read_text())


def tensors_of(description: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by pattern."""
    return {
        pattern: tuple(map(int, shape.split("x")))
        for shape, patterns in description["checkpoint"]["tensors"].items() if shape for pattern in patterns
    }  # fmt: skip


def test_all_published_checkpoints_have_a_file() -> None:
    assert sorted([
        "ltx2_19b_dev", "ltx2_19b_dev_fp8", "ltx2_19b_distilled", "ltx2_19b_distilled_fp8",
        "ltx2_3_22b_dev", "ltx2_3_22b_distilled", "ltxv_13b_dev", "ltxv_13b_distilled", "ltxv_2b_distilled",
    ]) == NAMES  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_metadata(name: str) -> None:
    model, transformer = model_named(name), described(name)["checkpoint"]["config"]["transformer"]
    audio_heads = transformer.get("audio_num_attention_heads", 0)
    assert model.size.num_layers == transformer["num_layers"]
    assert model.size.video_width == transformer["num_attention_heads"] * transformer["attention_head_dim"]
    assert model.size.audio_width == audio_heads * transformer.get("audio_attention_head_dim", 0)
    assert model.size.has_audio == (audio_heads > 0)
    heads = (transformer["num_attention_heads"], audio_heads) if audio_heads else (transformer["num_attention_heads"],)
    assert model.size.heads == heads


@pytest.mark.parametrize("name", [*NAMES, "nano"])
def test_a_model_takes_the_recipes_that_suit_it(name: str) -> None:
    """A dev model under a distilled recipe renders mush and ends with exit 0."""
    recipes = compose_recipes("render", [f"model={name}"]).usable
    model = model_named(name)
    assert {recipe for recipe in recipes if not misfit(recipes[recipe], model)} == SUITING[name]


def test_a_dev_model_with_a_distilled_recipe_is_told_why() -> None:
    reason = misfit(compose_recipes("render", []).usable["draft"], model_named("ltx2_19b_dev"))
    assert reason == "its few noise levels without guidance are for distilled models, ltx2_19b_dev is not one"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_a_model_has_a_source_of_the_same_name(name: str) -> None:
    model = model_named(name)
    for part, file in {**model.parts(), **model.extras()}.items():
        sources = [uri for key, uri in model.sources.items() if key.split("/")[0] == part]
        assert sources, part
        assert all(uri.startswith("hf://") for uri in sources)
        if file.endswith(".safetensors"):
            assert Path(sources[0]).name == file


@pytest.mark.parametrize("name", NAMES)
def test_planned_flops_of_a_pixel_are_those_of_the_decoders_convolutions(name: str) -> None:
    """Each weight is used once for each output position, 2 operations a time; time grows 2F-1, space twofold."""
    description = described(name)
    tensors = tensors_of(description)
    depth, height, width = 16, 34, 60

    def convolutions(prefix: str) -> float:
        total = 0
        for pattern, shape in tensors.items():
            if pattern.startswith(prefix) and pattern.endswith("conv.weight") and len(shape) == 5:
                first, last = pattern.partition("{")[2].partition("}")[0].split("-") if "{" in pattern else (0, 0)
                total += math.prod(shape) * (int(last) - int(first) + 1)
        return 2.0 * total * depth * height * width

    flops = convolutions("vae.decoder.conv_in.")
    for index, (kind, _) in enumerate(reversed(description["checkpoint"]["config"]["vae"]["decoder_blocks"])):
        flops += convolutions(f"vae.decoder.up_blocks.{index}.")
        if kind in ("compress_all", "compress_time"):
            depth = 2 * depth - 1
        if kind in ("compress_all", "compress_space"):
            height, width = 2 * height, 2 * width
    flops += convolutions("vae.decoder.conv_out.")
    assert model_named(name).size.decode_flops_per_pixel == pytest.approx(flops / PIXELS, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_planned_flops_of_a_text_token_are_those_of_encoder_and_connectors(name: str) -> None:
    size, description = model_named(name).size, described(name)
    encoder = json.loads((CONF / "published" / f"{description['text_encoder']}.json").read_text())["config"]
    text = size.text_tokens
    if "d_model" in encoder:
        # Projections to and from the heads (4), gated feed-forward (3), products of queries, keys and values (4).
        linear = 4 * encoder["d_model"] ** 2 + 3 * encoder["d_model"] * encoder["d_ff"]
        flops = encoder["num_layers"] * (2 * linear + 4 * text * encoder["d_model"])
    else:
        gemma = encoder["text_config"]
        queries, keys = (gemma["head_dim"] * gemma[f"num_{kind}heads"] for kind in ("attention_", "key_value_"))
        linear = gemma["hidden_size"] * (2 * queries + 2 * keys + 3 * gemma["intermediate_size"])
        flops = gemma["num_hidden_layers"] * (2 * linear + 4 * text * queries)
    for pattern, shape in tensors_of(description).items():
        if "embeddings_connector" in pattern and pattern.endswith(".weight") and len(shape) == 2:
            first, last = pattern.partition("{")[2].partition("}")[0].split("-") if "{" in pattern else (0, 0)
            copies = int(last) - int(first) + 1
            flops += copies * 2 * math.prod(shape)
            flops += copies * 4 * text * shape[0] if pattern.endswith("attn1.to_q.weight") else 0
        elif pattern.startswith("text_embedding_projection.") and pattern.endswith(".weight"):
            flops += 2 * math.prod(shape)
    assert size.text_flops_per_token == pytest.approx(flops, rel=2e-3)
