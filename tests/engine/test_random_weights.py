"""Random files have exactly the layout of the published ones, load through the real loader and stay finite."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5EncoderModel

from kernels.ops import reference_ops
from pipeline.config.model import PrecisionConfig
from pipeline.engine.loading import load_engine
from pipeline.engine.nano import _text_encoder_shapes
from pipeline.engine.random_weights import layout_of, quantised, write_random
from tests.engine.pictures import planes_of

PUBLISHED = Path(__file__).resolve().parents[2] / "conf" / "published"


def published(name):
    return json.loads((PUBLISHED / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "part", "inventory"),
    [
        ("ltx2_19b", "checkpoint", "ltx-2-19b-dev"),
        ("ltx2_19b", "spatial_upscaler", "ltx-2-spatial-upscaler-x2-1.0"),
        ("ltx2_3_22b", "checkpoint", "ltx-2.3-22b-dev"),
        ("ltx2_3_22b", "spatial_upscaler", "ltx-2.3-spatial-upscaler-x2"),
        ("ltxv_13b", "checkpoint", "ltxv-13b-0.9.8-dev"),
        ("ltxv_2b", "checkpoint", "ltxv-2b-0.9.8-distilled"),
        ("ltxv_2b", "spatial_upscaler", "ltxv-spatial-upscaler-0.9.8"),
    ],
)
def test_a_layout_is_the_published_files(fixtures, name, part, inventory):
    recorded = json.loads((fixtures / "inventory" / f"{inventory}.json").read_text())
    facts = published(name)[part]
    assert layout_of(facts["tensors"]) == {
        tensor: (tuple(shape), dtype) for tensor, (shape, dtype) in recorded["tensors"].items()
    }
    assert facts["config"] == recorded["metadata"]["config"]


def test_the_layout_in_8_bits_is_the_published_files(fixtures):
    recorded = json.loads((fixtures / "inventory" / "ltx-2-19b-dev-fp8.json").read_text())
    facts = published("ltx2_19b")
    assert quantised(layout_of(facts["checkpoint"]["tensors"]), tuple(facts["fp8_blocks"])) == {
        tensor: (tuple(shape), dtype) for tensor, (shape, dtype) in recorded["tensors"].items()
    }


def shapes_of(module):
    return sorted(tuple(tensor.shape) for tensor in module.state_dict().values())


def test_the_text_encoders_are_those_that_transformers_builds_from_their_configurations():
    with torch.device("meta"):
        gemma = Gemma3ForConditionalGeneration(Gemma3Config(**published("gemma-3-12b")["config"]))
        t5 = T5EncoderModel(T5Config(**published("t5-v1_1-xxl")["config"]))
    layout = layout_of(published("gemma-3-12b")["tensors"])
    # transformers ties the output layer to the embedding, which the file holds once; so for T5's two embeddings.
    assert sorted(shape for shape, _ in layout.values()) == [s for s in shapes_of(gemma.model)]
    assert sum(math.prod(shape) for shape, _ in layout.values()) == 12_187_325_040
    ours = sorted([*(shape for shape, _ in layout_of(published("t5-v1_1-xxl")["tensors"]).values()), (32128, 4096)])
    assert ours == shapes_of(t5)


def test_the_text_encoder_is_named_as_the_nano_models_which_loads():
    def general(names):
        return {re.sub(r"\d+", "*", name) for name in names}

    assert general(layout_of(published("gemma-3-12b")["tensors"])) == general(_text_encoder_shapes())


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_random_model_loads_and_renders_finite_frames(nano_model, nano_folder, recipe, request_for, tmp_path, dtype):
    for name in (nano_model.checkpoint, nano_model.spatial_upscaler, f"{nano_model.text_encoder}/model.safetensors"):
        with safe_open(nano_folder / name, "pt") as file:
            names = file.keys()
            layout = {tensor: (tuple(file.get_slice(tensor).get_shape()), dtype) for tensor in names}
            size = write_random(tmp_path / name, layout, file.metadata(), device="cpu", seed=3)
        assert (tmp_path / name).stat().st_size == size
    for file in (nano_folder / nano_model.text_encoder).glob("*.json"):
        (tmp_path / nano_model.text_encoder / file.name).write_text(file.read_text())
    nano_model.folder = str(tmp_path)
    engine = load_engine(nano_model, PrecisionConfig(), device="cpu", ops=reference_ops())
    streams = engine.render(request_for(width=64, height=64, num_frames=9), recipe, lambda stage: None)
    frames = planes_of(streams.frames)
    assert frames.std() > 1, "not a blank picture"
    assert np.isfinite(streams.waveform).all() and streams.waveform.std() > 0


def test_weights_in_8_bits_have_the_spread_of_the_others(tmp_path):
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    write_random(tmp_path / "x", quantised({name: ((64, 256), "BF16")}, (0, 0)), {}, device="cpu", seed=3)
    with safe_open(tmp_path / "x", "pt") as file:
        stored, scale = file.get_tensor(name), file.get_tensor(name + "_scale")
        assert stored.dtype == torch.float8_e4m3fn and file.get_tensor(name.replace("weight", "input_scale")) == 1
    assert float((stored.float() * scale).std()) == pytest.approx(1 / 16, rel=0.05)
