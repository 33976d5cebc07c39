"""The engine, from hidden states of the text encoder to frames and sound, against the official pipeline's record."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.ops import reference_ops
from pipeline.engine.components.audio_vae import load_audio_decoder
from pipeline.engine.components.connectors import load_text_connectors
from pipeline.engine.components.text import TextStates
from pipeline.engine.components.upsampler import load_latent_upsampler
from pipeline.engine.components.video_vae import load_video_decoder
from pipeline.engine.components.vocoder import load_vocoder
from pipeline.engine.denoise import denoising
from pipeline.engine.engine import RenderEngine
from pipeline.engine.latents import Tokens, add_noise, patchify_audio, patchify_video
from pipeline.engine.samplers import euler
from pipeline.engine.sigmas import noise_steps
from pipeline.engine.text import TextConditioner
from pipeline.geometry import PixelShape, latent_shape
from pipeline.model.checkpoint import CheckpointFile, load_denoiser


@pytest.fixture(scope="module")
def case(golden):
    return golden("e2e_ltx2_0/case_distilled_two_stage_t2v")


class RecordedStates:
    """A text encoder that says what the record's said."""

    def __init__(self, case):
        self.states = TextStates(case["in.hidden_states"], case["in.attention_mask"])

    def encode(self, prompts):
        return self.states


def recorded_noise(case, *, stages=(1, 2)):
    draws = iter([case[f"in.noise.stage{stage}.{stream}"] for stage in stages for stream in ("video", "audio")])

    def draw(shape):
        noise = next(draws)
        assert tuple(noise.shape) == shape
        return noise

    return draw


@pytest.fixture(scope="module")
def golden_engine(fixtures, case):
    folder = fixtures / "e2e_ltx2_0"
    checkpoint = CheckpointFile(folder / "checkpoint.safetensors")
    video_decoder = load_video_decoder(checkpoint, device="cpu", dtype=None)
    connectors = load_text_connectors(checkpoint, device="cpu", dtype=None)
    return RenderEngine(
        text=TextConditioner(RecordedStates(case), connectors),
        denoiser=load_denoiser(checkpoint, reference_ops(), "cpu"),
        upsampler=load_latent_upsampler(
            CheckpointFile(folder / "spatial_upsampler.safetensors"), video_decoder.statistics, device="cpu", dtype=None
        ),
        video_decoder=video_decoder,
        audio_decoder=load_audio_decoder(checkpoint, device="cpu", dtype=None),
        vocoder=load_vocoder(checkpoint, device="cpu"),
        device="cpu",
        noise_for=lambda seed: recorded_noise(case),
    )


def test_contexts_are_the_references(golden_engine, case):
    text = golden_engine.text.encode("any")
    case.assert_close("in.video_context", text.video_BSD)
    case.assert_close("in.audio_context", text.audio_BSD)


@pytest.mark.parametrize(("stage", "side_px"), [(1, 64), (2, 128)])
def test_every_step_of_a_stage_is_the_references(golden_engine, case, recipe, stage, side_px):
    shape = latent_shape(PixelShape(9, side_px, side_px, 24.0))
    sigmas = recipe.stages[stage - 1].sigmas
    if stage == 1:
        before = golden_engine._empty(shape)
    else:
        before = Tokens(patchify_video(case["mid.upsampled"]), patchify_audio(case["mid.stage1.audio_latent"]))
    start = add_noise(before, recorded_noise(case, stages=(stage,)), sigmas[0])
    text = golden_engine.text.encode("any")
    steps = list(denoising(golden_engine.denoiser, start, text, shape, noise_steps(sigmas), euler))
    assert len(steps) == len(sigmas) - 1
    for index, progress in enumerate(steps):
        for kind, tokens in (("x0", progress.clean), ("next", progress.state)):
            case.assert_close(f"mid.stage{stage}.step{index}.video.{kind}", tokens.video_BTC)
            case.assert_close(f"mid.stage{stage}.step{index}.audio.{kind}", tokens.audio_BTC)


def test_latents_between_the_stages_are_the_references(golden_engine, case):
    case.assert_close("mid.upsampled", golden_engine.upsampler.upsample(case["mid.stage1.video_latent"]))


def test_latents_after_both_stages_are_the_references(golden_engine, case, recipe):
    text = golden_engine.text.encode("any")
    rendered = PixelShape(9, 128, 128, 24.0)
    latents = golden_engine.sample(text, rendered, recipe, recorded_noise(case), lambda stage: None)
    case.assert_close("out.video_latent", latents.video_BCFHW)
    case.assert_close("out.audio_latent", latents.audio_BCTM)


def test_frames_and_sound_are_the_references(golden_engine, case, recipe, request_for):
    streams = golden_engine.render(request_for(width=128, height=128), recipe, lambda stage: None)
    frames, expected = np.concatenate(list(streams.frames)), case["out.video_uint8"].numpy()
    assert frames.shape == expected.shape and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
    case.assert_close("out.waveform", torch.from_numpy(streams.waveform))
    assert streams.sample_rate_hz == 600
