"""Clips of an engine that replays its small steps are the clips of one that does not, whatever its tier and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.ops import fused_ops
from pipeline.assembly.worker_side import has_room_for_graphs, with_graphs
from pipeline.config.model import PrecisionConfig
from pipeline.engine.loading import load_engine
from pipeline.model.graphs import Recorder
from pipeline.records.work import MEMORY_RUNGS
from tests.engine.pictures import planes_of

MANY = 1_000_000


def recorder(captures):
    """See `tests/model/test_graphs.py`."""

    def record(call):
        captures.append(call)
        return call

    return Recorder("cpu", record)


def clip(engine, recipe, request, rung=MEMORY_RUNGS[0]):
    streams = engine.render(request, recipe, lambda stage: None, memory_rung=rung)
    return planes_of(streams.frames), streams.waveform


def same(one, other):
    return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(("adapter", "captures_by_clip"), [("", [2, 2]), ("distilled", [2, 4])])
def test_clips_are_the_same_bytes(adapter, captures_by_clip, engine, recipe, request_for):
    """Graphs serve later clips, but where a stage's adapter puts other tensors in place of the weights."""
    recipe.stages[1].adapter = adapter
    captures, requests = [], [request_for(seed=1), request_for(seed=2)]
    wanted = [clip(engine, recipe, request) for request in requests]
    assert not same(*wanted)
    replaying = with_graphs(engine, MANY, recorder(captures))
    for request, expected, num_captures in zip(requests, wanted, captures_by_clip, strict=True):
        assert same(clip(replaying, recipe, request), expected)
        assert len(captures) == num_captures


def test_graphs_are_made_on_the_first_rung_only(engine, recipe, request_for):
    captures = []
    replaying = with_graphs(engine, MANY, recorder(captures))
    wanted = clip(engine, recipe, request_for())
    for rung, num_graphs in ((MEMORY_RUNGS[0], 2), *((rung, 0) for rung in MEMORY_RUNGS[1:]), (MEMORY_RUNGS[0], 2)):
        assert same(clip(replaying, recipe, request_for(), rung), wanted)
        assert replaying.graphs.num_graphs == num_graphs


def test_sparse_steps_and_dense_ones_of_a_stage_are_replayed_each_under_its_pattern(
    nano_model, load, recipe, request_for
):
    sparse = {"attention": "block_sparse", "dense_below_tokens": 0, "dense_first_layers": 0, "dense_last_layers": 0}
    engine = load(nano_model, **sparse, dense_above_level=0.98)
    captured, replayed, in_force = [], [], engine.shortcuts.sparse.in_force

    def record(call):
        captured.append(in_force.pattern)
        own = in_force.pattern

        def replay():
            assert in_force.pattern is own
            replayed.append(own)
            return call()

        return replay

    replaying = with_graphs(engine, MANY, Recorder("cpu", record))
    for seed in (1, 2):
        assert same(clip(replaying, recipe, request_for(seed=seed)), clip(engine, recipe, request_for(seed=seed)))
    # The dense steps of the first stage; the sparse ones of both stages, whose shapes differ. Once for both clips.
    assert len(captured) == 3 and captured.count(None) == 1
    # Of 8 and 3 steps, 4 are above the level; the first of each kind runs as it is, in the first clip.
    assert len(replayed) == 2 * 11 - 3


def test_an_engine_whose_parts_wait_replays_nothing_nor_one_that_is_told_so(engine):
    assert with_graphs(engine, 0) is engine
    engine.residency.tighten()
    assert with_graphs(engine, MANY) is engine


@pytest.mark.parametrize(
    ("free_gb", "reserved_gb", "limit_gb", "expected"),
    [(20.0, 67.0, None, True), (19.9, 67.0, None, False), (70.0, 60.0, 80.0, True), (70.0, 61.0, 80.0, False)],
)
def test_graphs_need_room_beside_the_fullest_phase(free_gb, reserved_gb, limit_gb, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (round(free_gb * 1e9), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: round(reserved_gb * 1e9))
    demands = [{"denoise": 3 * 10**9, "decode": 8 * 10**9}, {"decode": 10**9}]
    assert has_room_for_graphs(limit_gb, demands) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run make test-gpu on a machine with one")
@pytest.mark.parametrize("adapter", ["", "distilled"])
def test_clips_on_a_gpu_are_the_same_bytes(adapter, nano_model, recipe, request_for):
    recipe.stages[1].adapter = adapter
    engine = load_engine(nano_model, PrecisionConfig(dtype="bfloat16"), device="cuda", ops=fused_ops("cuda"))
    engine.denoiser.overlap_audio(torch.cuda.Stream())
    replaying = with_graphs(engine, MANY)
    for seed in (1, 2, 1):
        request = request_for(seed=seed)
        assert same(clip(replaying, recipe, request), clip(engine, recipe, request))
        assert replaying.graphs.num_graphs >= 1
