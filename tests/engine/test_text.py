"""Prompts encoded ahead: in one use of the text encoder, and to the bit as each by itself."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from pipeline.engine import text
from pipeline.engine.text import TEXT_ENCODER

PROMPTS = ["a red fox", "waves crash on black rocks, slowly", "snow"]


@pytest.fixture
def uses(engine, monkeypatch):
    """Every use of a part that may have to be moved for it."""
    noted = []
    using = engine.residency.using

    @contextmanager
    def noting(name):
        noted.append(name)
        with using(name):
            yield

    monkeypatch.setattr(engine.residency, "using", noting)
    return noted


@pytest.mark.parametrize("offload", [False, True])
def test_prompts_encoded_ahead_are_to_the_bit_those_encoded_one_by_one(engine, nano_model, load, uses, offload):
    if offload:
        engine.residency.tighten()
    engine.prefetch_texts(PROMPTS)
    ahead = engine.text.encode_all(*PROMPTS)
    assert uses == [TEXT_ENCODER], "moved once for all of them"
    other = load(nano_model).text
    for prompt, context in zip(PROMPTS, ahead, strict=True):
        alone = other.encode(prompt)
        assert torch.equal(context.video_BSD, alone.video_BSD)
        assert torch.equal(context.audio_BSD, alone.audio_BSD)


def test_clip_whose_prompt_was_encoded_ahead_does_not_need_the_encoder(engine, recipe, request_for, uses):
    engine.prefetch_texts([request_for().prompt])
    uses.clear()
    engine.render(request_for(), recipe, lambda stage: None)
    assert TEXT_ENCODER not in uses


def test_no_more_prompts_are_encoded_ahead_than_are_kept(engine, monkeypatch, uses):
    monkeypatch.setattr(text, "NUM_CACHED_PROMPTS", 2)
    engine.prefetch_texts(PROMPTS)
    uses.clear()
    engine.text.encode_all(*PROMPTS[:2])
    assert uses == []
    engine.text.encode(PROMPTS[2])
    engine.text.encode(PROMPTS[0])
    assert uses == [TEXT_ENCODER] * 2, "the third was not encoded ahead, and pushed out the first"


def test_prompts_known_already_are_not_encoded_again(engine, uses):
    engine.text.encode(PROMPTS[0])
    uses.clear()
    engine.prefetch_texts(PROMPTS[:1] * 2)
    assert uses == []
