"""What conf/model/nano.yaml tells the planner of operations outside the denoiser is what the nano parts need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.geometry import PixelShape, latent_shape

NANO_YAML = Path(__file__).resolve().parents[2] / "conf" / "model" / "nano.yaml"


@pytest.fixture(scope="module")
def planned():
    return yaml.safe_load(NANO_YAML.read_text())["size"]


def _count(run):
    # The counter does not know the fused attention of the CPU; written out, attention is products like any other.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_planned_flops_of_a_text_token_are_those_of_encoder_and_connectors(engine, planned):
    measured = _count(lambda: engine.text.encode("a red fox")) / planned["text_tokens"]
    assert planned["text_flops_per_token"] == pytest.approx(measured, rel=0.1)


def test_planned_flops_of_a_pixel_are_those_of_the_video_decoder(engine, planned):
    pixels = PixelShape(num_frames=25, height=128, width=192, fps=24.0)
    shape = latent_shape(pixels)
    latent = torch.zeros(1, 16, shape.num_frames, shape.height, shape.width)
    measured = _count(lambda: engine.video_decoder.decode(latent))
    measured /= pixels.num_frames * pixels.height * pixels.width
    assert planned["decode_flops_per_pixel"] == pytest.approx(measured, rel=0.1)
