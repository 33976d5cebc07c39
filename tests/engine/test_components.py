"""Parts are filled strictly from published names: every tensor has an owner, and files of another kind are refused."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from pipeline.engine.components.parts import part_blueprints, tensors_of_parts
from pipeline.engine.components.upsampler import latent_upsampler_blueprint
from pipeline.engine.components.video_vae import load_video_decoder, load_video_encoder
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import CheckpointFile, denoiser_tensors

SINGLE_FILES = [
    "ltx-2-19b-dev",
    "ltx-2-19b-dev-fp8",
    "ltx-2.3-22b-dev",
    "ltx-2.3-22b-dev-fp8",
    "ltxv-13b-0.9.8-dev",
    "ltxv-2b-0.9.8-distilled",
]
UPSCALERS = ["ltx-2-spatial-upscaler-x2-1.0", "ltx-2.3-spatial-upscaler-x2", "ltxv-spatial-upscaler-0.9.8"]


@pytest.fixture
def inventory(fixtures):
    """Metadata and shapes of a published file."""

    def read(name):
        content = json.loads((fixtures / "inventory" / f"{name}.json").read_text())
        config = content["metadata"]["config"]
        shapes = {tensor: shape for tensor, (shape, _) in content["tensors"].items()}
        return config, shapes

    return read


@pytest.fixture
def rewritten(fixtures, tmp_path):
    """A copy of a fixture's checkpoint after `change(tensors, config)`."""

    def build(name, change):
        source = CheckpointFile(fixtures / name)
        tensors, config = load_file(fixtures / name), source.config
        change(tensors, config)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, {"config": json.dumps(config)})
        return CheckpointFile(path)

    return build


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_every_published_tensor_outside_the_denoiser_has_an_owner(inventory, name):
    config, shapes = inventory(name)
    assert tensors_of_parts(config) == set(shapes) - set(denoiser_tensors(shapes))


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_parts_of_published_size_expect_the_published_shapes(inventory, name):
    config, shapes = inventory(name)
    for plan in part_blueprints(config, num_text_states=49):
        tensors = plan.module.state_dict()
        for on_disk, place in plan.names.items():
            assert list(tensors[place].shape) == shapes[on_disk], on_disk


@pytest.mark.parametrize("name", UPSCALERS)
def test_upscalers_of_published_size_expect_the_published_tensors(inventory, name):
    config, shapes = inventory(name)
    tensors = latent_upsampler_blueprint(config).module.state_dict()
    assert {place: list(tensor.shape) for place, tensor in tensors.items()} == shapes


def test_missing_tensor_is_named(rewritten):
    def drop(tensors, config):
        del tensors["vae.decoder.conv_out.conv.bias"]

    with pytest.raises(CheckpointMismatch, match=r"vae\.decoder\.conv_out\.conv\.bias"):
        load_video_decoder(rewritten("vae_ltx2_0/model.safetensors", drop), device="cpu", dtype=None)


def test_missing_section_of_the_metadata_is_named(rewritten):
    def drop(tensors, config):
        del config["vae"]

    with pytest.raises(CheckpointMismatch, match="no section 'vae'"):
        load_video_decoder(rewritten("vae_ltx2_0/model.safetensors", drop), device="cpu", dtype=None)


@pytest.mark.parametrize("load", [load_video_decoder, load_video_encoder])
def test_video_blocks_of_an_unknown_kind_are_refused(rewritten, load):
    def change(tensors, config):
        for direction in ("encoder_blocks", "decoder_blocks"):
            config["vae"][direction][1][0] = "attn_res_x"

    with pytest.raises(UsageError, match="attn_res_x"):
        load(rewritten("vae_ltx2_0/model.safetensors", change), device="cpu", dtype=None)
