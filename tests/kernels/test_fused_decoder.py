"""A decoder that works by our kernels gives the stream of the library's modules, whichever frames go together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.engine.components.streamed_decoder import Manner
from pipeline.engine.components.video_vae import DecodeNoise, load_video_decoder
from pipeline.model.checkpoint import CheckpointFile

pytestmark = pytest.mark.gpu

BOUND = 1e-5


# Reflected at the edges; zeros there, told a timestep, and what goes round the upsamplers.
# Interpreted kernels are slow: each decoder once.
@pytest.mark.parametrize(
    ("name", "num_samples", "frames_per_convolution"), [("vae_ltx2_0", 1, 8), ("vae_ltxv_0_9_8", 2, 3)]
)
def test_a_stream_by_kernels_is_that_by_the_library(
    device, fixtures, monkeypatch, name, num_samples, frames_per_convolution
):
    from kernels import add_with_bias, framed_norm_silu

    # A GPU's shorter way to multiply differs by more than what is compared here.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ours = replace(
        reference_ops(),
        framed=framed_norm_silu.framed,
        framed_norm_silu=framed_norm_silu.framed_norm_silu,
        add_with_bias_=add_with_bias.add_with_bias_,
    )
    decoder = load_video_decoder(CheckpointFile(fixtures / name / "model.safetensors"), device=device, dtype=None)
    decoder.module.to(memory_format=torch.channels_last_3d)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(num_samples, 16, 2, 2, 2, generator=generator).to(device)

    def decoded(manner: Manner) -> Tensor:
        decoder.manner = manner
        noise = DecodeNoise(0.05) if decoder.takes_noise else None
        with torch.inference_mode():
            return torch.cat(list(decoder.stream(latent, noise=noise)), dim=2)

    expected = decoded(Manner(frames_per_convolution))
    got = decoded(Manner(frames_per_convolution, fused=ours))
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= BOUND * expected.abs().max()
