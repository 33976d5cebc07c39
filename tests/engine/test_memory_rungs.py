"""The rungs of the memory ladder: less device memory on each, the same bytes on all; and what counts as too little."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from pipeline.engine import loading
from pipeline.engine.decode import CHUNK_LATENT_FRAMES, SMALL_CHUNK_LATENT_FRAMES
from pipeline.engine.engine import DENOISER, VIDEO_DECODER
from pipeline.engine.residency import Residency
from pipeline.engine.text import TEXT_ENCODER
from pipeline.errors import OutOfMemory
from pipeline.records.work import MEMORY_RUNGS
from tests.engine.pictures import planes_of

EVERY_PART = {TEXT_ENCODER, DENOISER, VIDEO_DECODER}


def ignore(stage):
    pass


def clip_on(rung, engine, recipe, request):
    streams = engine.render(request, recipe, ignore, memory_rung=rung)
    return list(streams.frames), streams.waveform


def test_every_rung_gives_the_same_bytes(engine, recipe, request_for):
    recipe.stages[1].adapter = "distilled"
    request = request_for(width=100, height=66, num_frames=25)
    clips = [clip_on(rung, engine, recipe, request) for rung in (*MEMORY_RUNGS, MEMORY_RUNGS[0])]
    frames = [planes_of(chunks) for chunks, _ in clips]
    assert all(np.array_equal(frames[0], others) for others in frames[1:])
    assert all(np.array_equal(clips[0][1], waveform) for _, waveform in clips[1:])


def test_lower_rungs_decode_in_smaller_chunks(engine, recipe, request_for):
    assert SMALL_CHUNK_LATENT_FRAMES < CHUNK_LATENT_FRAMES
    expected = {"planned": 8 * CHUNK_LATENT_FRAMES}
    for rung in MEMORY_RUNGS:
        chunks, _ = clip_on(rung, engine, recipe, request_for(num_frames=25))
        assert chunks[0].num_frames == expected.get(rung, 8 * SMALL_CHUNK_LATENT_FRAMES)


def test_on_the_last_rung_every_part_that_can_waits_and_comes_back_for_the_next_clip(engine, recipe, request_for):
    clip_on("small_decode_chunks", engine, recipe, request_for())
    assert engine.residency.waiting == ()
    clip_on("offload", engine, recipe, request_for())
    assert set(engine.residency.waiting) == EVERY_PART
    clip_on("planned", engine, recipe, request_for())
    assert engine.residency.waiting == ()


def test_text_encoder_in_fewer_bits_cannot_wait_on_the_last_rung(nano_model, load, monkeypatch, recipe, request_for):
    # Whole numbers in their place: what matters is what loading makes of the setting.
    in_16_bits = loading.load_text_encoder
    monkeypatch.setattr(
        loading, "load_text_encoder", lambda *args, bits, **kwargs: in_16_bits(*args, bits=16, **kwargs)
    )
    engine = load(nano_model, text_encoder_bits=8)
    clip_on("offload", engine, recipe, request_for())
    assert set(engine.residency.waiting) == EVERY_PART - {TEXT_ENCODER}


def test_parts_that_wait_from_now_on_are_away_between_uses():
    module = torch.nn.Linear(3, 2)
    residency = Residency("cpu")
    residency.keep("part", module)
    with residency.using("part"):
        home = module.weight.data_ptr()
    residency.tighten()
    residency.tighten()
    with residency.using("part"):
        assert module.weight.data_ptr() != home
    assert residency.waiting == ("part",)


def test_a_lower_rung_first_frees_what_a_failure_left_behind(engine, recipe, request_for, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("device"))
    on_gpu = dataclasses.replace(engine, residency=Residency("cuda"))

    class Left:
        def __init__(self):
            self.itself = self

    gc.disable()
    left = weakref.ref(Left())
    try:
        clip_on("planned", on_gpu, recipe, request_for())
        assert freed == [] and left() is not None
        clip_on("small_decode_chunks", on_gpu, recipe, request_for())
        assert freed == ["device"] and left() is None
    finally:
        gc.enable()


def exhaust(*args, **kwargs):
    raise torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")


@pytest.mark.parametrize("part", ["text", "denoiser", "upsampler", "audio_decoder"])
def test_memory_exhausted_in_any_phase_is_reported_and_the_next_clip_is_rendered(engine, recipe, request_for, part):
    class Full:
        hparams = engine.denoiser.hparams
        encode_all = prepare = upsample = decode = exhaust
        num_latent_bins = engine.audio_decoder.num_latent_bins

    before = clip_on("planned", engine, recipe, request_for())
    with pytest.raises(
        OutOfMemory, match=r"a clip of 64x64, 9 frames does not fit the device: tried to allocate 80 GiB$"
    ):
        dataclasses.replace(engine, **{part: Full()}).render(request_for(), recipe, ignore)
    after = clip_on("offload", engine, recipe, request_for())
    assert np.array_equal(planes_of(before[0]), planes_of(after[0]))


def fail_to_pin():
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")


def test_a_rung_that_the_host_has_no_memory_for_is_reported_as_that(engine, recipe, request_for, monkeypatch):
    monkeypatch.setattr(engine.residency, "tighten", fail_to_pin)
    with pytest.raises(OutOfMemory, match="does not fit the host"):
        engine.render(request_for(), recipe, ignore, memory_rung="offload")


@pytest.mark.parametrize(
    ("allocate", "reason"),
    [
        (lambda: torch.empty(10**15), "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        (lambda: bytearray(10**17), "memory is exhausted"),
        (fail_to_pin, "CUDA error: out of memory$"),
    ],
)
def test_exhausted_host_memory_is_reported_as_the_hosts(engine, recipe, request_for, allocate, reason):
    class Full:
        def encode_all(self, *prompts):
            allocate()

        def prefetch(self, prompts):
            allocate()

    full = dataclasses.replace(engine, text=Full())
    with pytest.raises(OutOfMemory, match=f"a clip of 64x64, 9 frames does not fit the host: .*{reason}"):
        full.render(request_for(), recipe, ignore)
    with pytest.raises(OutOfMemory, match=f"the text of clips to come does not fit the host: .*{reason}"):
        full.prefetch_texts(["a fox"])


def test_other_errors_of_the_library_stay_what_they_are(engine, recipe, request_for):
    class Broken:
        def encode_all(self, *prompts):
            torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        dataclasses.replace(engine, text=Broken()).render(request_for(), recipe, ignore)
