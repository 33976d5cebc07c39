"""Steps are told as they are done; whoever is told may end the clip there, and the engine is ready for the next one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.engine.decode import CHUNK_LATENT_FRAMES
from pipeline.engine.samplers import SAMPLERS
from pipeline.errors import EngineFault
from tests.engine.conftest import STAGE_1_SIGMAS, STAGE_2_SIGMAS
from tests.engine.pictures import planes_of


def ignore(stage):
    pass


def of_both(engine, recipe, request, **progress):
    streams = engine.render(request, recipe, ignore, **progress)
    return planes_of(streams.frames), streams.waveform


def test_every_step_is_told_once_it_is_done_and_chunks_before_and_after(engine, recipe, request_for):
    told = []
    streams = engine.render(
        request_for(num_frames=25), recipe, lambda stage: told.append(stage), on_step=lambda *step: told.append(step)
    )
    first, second = len(STAGE_1_SIGMAS) - 1, len(STAGE_2_SIGMAS) - 1
    before_frames = [
        "text_encode",
        ("text_encode", 1, 1),
        "denoise",
        *[("denoise", step, first) for step in range(1, first + 1)],
        "upsample",
        "denoise",
        *[("denoise", step, second) for step in range(1, second + 1)],
        "decode",
    ]
    assert told == before_frames
    list(streams.frames)
    chunk = 8 * CHUNK_LATENT_FRAMES
    assert told == [*before_frames, ("decode", 0, 25), ("decode", chunk, 25), ("decode", 25, 25)]


def test_an_engine_whose_frames_nobody_takes_tells_the_same_steps(engine, request_for, recipe):
    told = {True: [], False: []}
    for hands_out, steps in told.items():
        one_of_a_gang = replace(engine, hands_out_frames=hands_out)
        clip = one_of_a_gang.render(
            request_for(num_frames=25), recipe, ignore, on_step=lambda *step, told=steps: told.append(step)
        )
        assert [bool(frames.nbytes) for frames in clip.frames] == [hands_out] * 2
    assert told[True] == told[False]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_the_steps_it_announces(engine, request_for, sampler):
    told = []
    # One of them is for stages guided by a negative prompt only.
    guidance = [GuidanceConfig(video=StreamGuidance(cfg=2.0))]
    stage = StageConfig(sigmas=[0.9, 0.6, 0.3, 0.0], sampler=sampler, guidance=guidance)
    recipe = RecipeConfig(name="one", stages=[stage])
    engine.render(request_for(), recipe, ignore, on_step=lambda *step: told.append(step))
    assert told[1:] == [("denoise", step, 3) for step in (1, 2, 3)]


class Cancelled(Exception):
    """An error of the caller's own."""


def cancel_at(stage, step):
    def on_step(*told):
        if told[:2] == (stage, step):
            raise Cancelled

    return on_step


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("where", [("text_encode", 1), ("denoise", 2), ("denoise", 7), ("decode", 16)])
def test_clip_ended_at_any_step_leaves_the_engine_ready_for_the_next(engine, recipe, request_for, where, offload):
    recipe.stages[0].adapter = "distilled"
    request = request_for(num_frames=25)
    frames, waveform = of_both(engine, recipe, request)
    rung = "offload" if offload else "planned"
    homes = [tensor.data_ptr() for tensor in engine.video_decoder.module.parameters()]
    with pytest.raises(Cancelled) as caught:
        of_both(engine, recipe, request_for(num_frames=25, seed=2), on_step=cancel_at(*where), memory_rung=rung)
    assert caught.value.__cause__ is None and not isinstance(caught.value, EngineFault)
    assert [tensor.data_ptr() for tensor in engine.video_decoder.module.parameters()] == homes
    again, again_waveform = of_both(engine, recipe, request)
    assert np.array_equal(frames, again) and np.array_equal(waveform, again_waveform)


def test_frames_that_are_no_longer_wanted_give_the_decoder_back(engine, recipe, request_for):
    engine.residency.tighten()
    homes = [tensor.data_ptr() for tensor in engine.video_decoder.module.parameters()]
    streams = engine.render(request_for(num_frames=25), recipe, ignore, memory_rung="offload")
    next(streams.frames)
    assert [tensor.data_ptr() for tensor in engine.video_decoder.module.parameters()] != homes
    streams.frames.close()
    assert [tensor.data_ptr() for tensor in engine.video_decoder.module.parameters()] == homes
