"""The engine on a GPU: the same clip as on the CPU, within what another order of summation gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.ops import reference_ops
from pipeline.config.model import PrecisionConfig
from pipeline.engine.loading import load_engine
from tests.engine.pictures import planes_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one"),
]


def rendered(model, recipe, request, device):
    engine = load_engine(model, PrecisionConfig(), device=device, ops=reference_ops())
    streams = engine.render(request, recipe, lambda stage: None)
    return planes_of(streams.frames).astype(np.float32), streams.waveform


def test_a_clip_on_the_gpu_is_the_clip_on_the_cpu(nano_model, recipe, request_for):
    request = request_for(width=192, height=128, num_frames=25)
    frames, waveform = rendered(nano_model, recipe, request, "cpu")
    gpu_frames, gpu_waveform = rendered(nano_model, recipe, request, "cuda")
    assert frames.shape == gpu_frames.shape
    assert np.abs(frames - gpu_frames).mean() < 0.5, "in levels of 255"
    assert np.abs(waveform - gpu_waveform).max() < 1e-3 * np.abs(waveform).max()


def test_the_same_request_gives_the_same_bytes_twice_on_the_gpu(nano_model, recipe, request_for):
    first, second = (rendered(nano_model, recipe, request_for(), "cuda") for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
