"""Replayed calls are the calls, to the bit: which are captured, what is copied for each, what ends a graph.

On the CPU a call is "captured" by remembering it and "replayed" by calling it again, so that it sees what a graph would
see: the graph's own tensors, and nothing that was given since.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch

from kernels.ops import fused_ops, reference_ops
from pipeline.engine.residency import Residency
from pipeline.model import graphs
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.graphs import NUM_KEPT, ON_CUDA, GraphedDenoiser, Recorder
from pipeline.model.sparse_attention import PatternInForce
from pipeline.model.streams import DistinctTimesteps, Perturbation
from tests.model.test_fused import moved, on_a_gpu

MANY = 1_000_000
# Among them held tokens (an index of timesteps), masks of tokens, a text that is modulated at each step, keyframes that
# are marked, and a model without sound.
CASES = ["2_0/case_t2v", "2_0/case_i2v", "2_0/case_masked", "2_3/case_i2v", "2_5/case_i2v", "v_0_9_8_2b/case_i2v"]


class Memory:
    """A recorder for the CPU. Captures fail with the errors in `failures`, one each."""

    def __init__(self, *failures):
        self.num = Counter()
        self.failures = list(failures)
        self.recorder = Recorder("cpu", self.record)

    def record(self, call):
        if self.failures:
            raise self.failures.pop(0)
        self.num["captures"] += 1

        def replay():
            self.num["replays"] += 1
            return call()

        return replay


@pytest.fixture
def memory():
    return Memory()


def graphed(denoiser, memory, below=MANY, in_force=None):
    return GraphedDenoiser(denoiser, below, in_force, memory.recorder)


def at_step(stream, step):
    """The stream as another step of the same stage would have it."""
    if stream is None:
        return None
    timesteps = DistinctTimesteps(stream.timesteps.values_BK * (1 - step / 10), stream.timesteps.index_BT)
    return replace(
        stream, tokens_BTC=stream.tokens_BTC + step, timesteps=timesteps, sigma_B=stream.sigma_B * (1 - step / 10)
    )


def with_other_text(stream):
    return None if stream is None else replace(stream, text_BSD=stream.text_BSD.flip(-1))


def shorter(stream, num_tokens):
    """The first tokens of a stream of one timestep."""
    return replace(
        stream,
        tokens_BTC=stream.tokens_BTC[:, :num_tokens].contiguous(),
        timesteps=DistinctTimesteps.uniform(stream.sigma_B),
        positions_BAT2=stream.positions_BAT2[:, :, :num_tokens],
    )


def equal(got, wanted):
    return all(a is b if b is None else torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def assert_steps_equal(replayed, eager, streams, conditioning, steps=4):
    """All velocities are kept until the end: a replay must not change what another one made."""
    every = [[at_step(stream, step) for stream in streams] for step in range(steps)]
    got = [replayed(*given, conditioning) for given in every]
    wanted = [eager(*given, conditioning) for given in every]
    assert all(equal(*pair) for pair in zip(got, wanted, strict=True))
    assert not equal(wanted[0], wanted[1])


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_a_stage_is_the_call_to_the_bit(name, load, golden, memory):
    folder, case_name = f"dit_ltx{name}".split("/")
    case, denoiser = golden(f"{folder}/{case_name}"), load(folder)
    conditioning = denoiser.prepare(case.video, case.audio)
    assert_steps_equal(graphed(denoiser, memory), denoiser, (case.video, case.audio), conditioning)
    assert memory.num == {"captures": 1, "replays": 3}


def test_a_later_clip_of_the_shape_is_replayed_with_its_own_text(av_denoiser, golden, memory):
    case, replayed = golden("dit_ltx2_0/case_t2v"), graphed(av_denoiser, memory)
    texts = [(case.video, case.audio), (with_other_text(case.video), with_other_text(case.audio))]
    kept = [av_denoiser.prepare(*streams) for streams in texts]
    for clip in (0, 1, 0, 0):
        assert_steps_equal(replayed, av_denoiser, texts[clip], kept[clip], steps=2)
    assert not equal(*(av_denoiser(*streams, each) for streams, each in zip(texts, kept, strict=True)))
    assert memory.num == {"captures": 1, "replays": 7}


def test_conditioning_is_copied_once_a_clip_and_not_kept_alive(av_denoiser, golden, memory, monkeypatch):
    case, replayed = golden("dit_ltx2_0/case_t2v"), graphed(av_denoiser, memory)
    copied, copy = [], graphs._copy

    def noted(into, given):
        copied.append(type(given))
        copy(into, given)

    monkeypatch.setattr(graphs, "_copy", noted)
    conditioning = av_denoiser.prepare(case.video, case.audio)
    for _ in range(4):
        replayed(case.video, case.audio, conditioning)
    assert Counter(copied) == {tuple: 4, type(conditioning): 1}, "for the capture, then for three replays"
    gone = weakref.ref(conditioning)
    del conditioning
    gc.collect()
    assert gone() is None
    replayed(case.video, case.audio, av_denoiser.prepare(case.video, case.audio))
    assert Counter(copied)[type(av_denoiser.prepare(case.video, case.audio))] == 2


def test_samples_that_share_their_tokens_are_copied_as_they_lie(av_denoiser, golden, memory):
    case = golden("dit_ltx2_0/case_t2v")
    first = [replace(stream, tokens_BTC=stream.tokens_BTC[:1].expand_as(stream.tokens_BTC))
             for stream in (case.video, case.audio)]  # fmt: skip
    conditioning = av_denoiser.prepare(*first)
    replayed = graphed(av_denoiser, memory)
    for step in range(3):
        given = [replace(stream, tokens_BTC=(stream.tokens_BTC[:1] + step).expand_as(stream.tokens_BTC))
                 for stream in first]  # fmt: skip
        assert equal(replayed(*given, conditioning), av_denoiser(*given, conditioning))
    # The same numbers, each in a place of its own, are another call.
    assert equal(replayed(case.video, case.audio, conditioning), av_denoiser(case.video, case.audio, conditioning))
    assert memory.num["captures"] == 1


def test_what_a_graph_cannot_know_passes_through(av_denoiser, golden, memory):
    case = golden("dit_ltx2_0/case_t2v")
    replayed = graphed(av_denoiser, memory)
    conditioning = av_denoiser.prepare(case.video, case.audio)
    num_samples = case.video.tokens_BTC.shape[0]
    perturbed = [Perturbation(frozenset({0}))] * num_samples
    ways = [
        (case.video, case.audio),
        (None, case.audio, conditioning),
        (case.video, case.audio, conditioning, perturbed),
        (case.video, case.audio, conditioning, None, lambda before, after_first, run: run()),
    ]
    for given in ways:
        for _ in range(3):
            assert equal(replayed(*given), av_denoiser(*given))
    assert replayed.num_graphs == 0


def test_a_graph_is_of_the_pattern_that_was_in_force(av_denoiser, golden, memory):
    case, in_force = golden("dit_ltx2_0/case_t2v"), PatternInForce()
    replayed = graphed(av_denoiser, memory, in_force=in_force)
    conditioning = av_denoiser.prepare(case.video, case.audio)
    for num_captures, pattern in enumerate((None, object(), object()), start=1):
        for _ in range(3):
            with in_force.during(pattern):
                replayed(case.video, case.audio, conditioning)
        assert memory.num == {"captures": num_captures, "replays": 2 * num_captures}
    with in_force.during(None):
        replayed(case.video, case.audio, conditioning)
    assert memory.num == {"captures": 3, "replays": 7}, "the dense one is still there"


def test_only_calls_of_fewer_tokens_on_the_recorders_device_are_captured(av_denoiser, golden, memory):
    case = golden("dit_ltx2_0/case_t2v")
    conditioning = av_denoiser.prepare(case.video, case.audio)
    num_samples, num_tokens = case.video.tokens_BTC.shape[:2]
    on_cuda = GraphedDenoiser(av_denoiser, MANY, recorder=ON_CUDA)
    for replayed in (graphed(av_denoiser, memory, below=num_samples * num_tokens), on_cuda):
        for _ in range(3):
            replayed(case.video, case.audio, conditioning)
        assert replayed.num_graphs == 0
    replayed = graphed(av_denoiser, memory, below=num_samples * num_tokens + 1)
    for _ in range(3):
        replayed(case.video, case.audio, conditioning)
    assert replayed.num_graphs == 1


def test_each_shape_has_a_graph_and_the_least_recently_used_go(av_denoiser, golden, memory):
    case, replayed = golden("dit_ltx2_0/case_t2v"), graphed(av_denoiser, memory)

    def clip(num_tokens, with_sound=True):
        streams = shorter(case.video, num_tokens), case.audio if with_sound else None
        conditioning = av_denoiser.prepare(*streams)
        for _ in range(2):
            assert equal(replayed(*streams, conditioning), av_denoiser(*streams, conditioning))

    for num_tokens in (*range(2, 1 + NUM_KEPT), 2):
        clip(num_tokens)
    clip(2, with_sound=False)
    assert replayed.num_graphs == memory.num["captures"] == NUM_KEPT
    clip(1)
    assert replayed.num_graphs == NUM_KEPT and memory.num["captures"] == NUM_KEPT + 1
    clip(2)
    assert memory.num["captures"] == NUM_KEPT + 1, "used again before, so still there"
    clip(3)
    assert memory.num["captures"] == NUM_KEPT + 2


class TestMovedWeights:
    @pytest.fixture
    def loaded(self, fixtures):
        checkpoint = CheckpointFile(fixtures / "dit_ltx2_0" / "model.safetensors")
        denoiser = load_denoiser(checkpoint, reference_ops(), "cpu", torch.float32)
        return denoiser, FusedAdapters(denoiser, checkpoint, torch.float32)

    def test_adapters_end_the_graphs(self, loaded, golden, memory, fixtures):
        denoiser, fused = loaded
        case, replayed = golden("dit_ltx2_0/case_t2v"), graphed(denoiser, memory)
        clean = None
        for number, adapters in enumerate(([], [(fixtures / "lora" / "lora_a.safetensors", 0.8)], []), start=1):
            fused.use(adapters)
            conditioning = denoiser.prepare(case.video, case.audio)
            assert_steps_equal(replayed, denoiser, (case.video, case.audio), conditioning)
            assert memory.num["captures"] == number and replayed.num_graphs == 1
            velocities = replayed(case.video, case.audio, conditioning)
            clean = velocities if clean is None else clean
            assert equal(velocities, clean) == (not adapters)

    def test_a_part_that_waited_on_the_host_ends_the_graphs_and_a_change_in_place_does_not(
        self, loaded, golden, memory
    ):
        denoiser, _ = loaded
        case, replayed, residency = golden("dit_ltx2_0/case_t2v"), graphed(denoiser, memory), Residency("cpu")
        conditioning = denoiser.prepare(case.video, case.audio)
        for _ in range(3):
            replayed(case.video, case.audio, conditioning)
        denoiser.video.head.bias.data.add_(1.0)
        assert equal(replayed(case.video, case.audio, conditioning), denoiser(case.video, case.audio, conditioning))
        assert memory.num["captures"] == 1
        residency.keep("denoiser", denoiser)
        residency.tighten()
        with residency.using("denoiser"):
            # The conditioning is the same one as before: nobody told.
            assert_steps_equal(replayed, denoiser, (case.video, case.audio), conditioning, steps=2)
        assert memory.num["captures"] == 2


def test_forgotten_graphs_are_captured_anew_and_not_while_they_are_not_allowed(av_denoiser, golden, memory):
    case, replayed = golden("dit_ltx2_0/case_t2v"), graphed(av_denoiser, memory)
    conditioning = av_denoiser.prepare(case.video, case.audio)

    def graphs_after_three_calls():
        for _ in range(3):
            replayed(case.video, case.audio, conditioning)
        return replayed.num_graphs

    assert graphs_after_three_calls() == 1 and replayed.capture_s >= 0
    replayed.forget()
    assert replayed.num_graphs == 0 and graphs_after_three_calls() == 1
    replayed.overlap_audio(None)
    assert replayed.num_graphs == 0 and graphs_after_three_calls() == 1
    replayed.allow(False)
    assert replayed.num_graphs == 0 and graphs_after_three_calls() == 0
    replayed.allow(True)
    assert graphs_after_three_calls() == 1
    assert memory.num["captures"] == 4


def test_without_memory_for_it_a_call_runs_as_it_is_and_others_are_captured(av_denoiser, golden):
    case, memory = golden("dit_ltx2_0/case_t2v"), Memory()
    replayed = graphed(av_denoiser, memory)
    conditioning = av_denoiser.prepare(case.video, case.audio)
    for _ in range(2):
        replayed(shorter(case.video, 2), None, av_denoiser.prepare(shorter(case.video, 2), None))
    memory.failures.append(torch.OutOfMemoryError("CUDA out of memory"))
    assert_steps_equal(replayed, av_denoiser, (case.video, case.audio), conditioning)
    assert replayed.num_graphs == 0 and replayed.capture_s is None, "the other graph made room"
    for _ in range(2):
        replayed(case.video, None, conditioning)
    assert replayed.num_graphs == 1


def test_a_call_that_cannot_be_captured_is_the_last_that_is_tried(av_denoiser, golden, caplog):
    case, memory = (
        golden("dit_ltx2_0/case_t2v"),
        Memory(RuntimeError("operation not permitted when stream is capturing")),
    )
    replayed = graphed(av_denoiser, memory)
    conditioning = av_denoiser.prepare(case.video, case.audio)
    assert_steps_equal(replayed, av_denoiser, (case.video, case.audio), conditioning)
    for _ in range(3):
        replayed(case.video, None, conditioning)
    assert memory.num["captures"] == 0 and "not captured" in caplog.text


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.fixture(params=[{}, {"fp8_blocks": {0, 1}}], ids=["exact", "fp8"])
    def loaded(self, request, fixtures):
        checkpoint = CheckpointFile(fixtures / "dit_ltx2_0" / "model.safetensors")
        denoiser = load_denoiser(checkpoint, fused_ops("cuda"), "cuda", torch.bfloat16, **request.param)
        denoiser.overlap_audio(torch.cuda.Stream())
        return denoiser, FusedAdapters(denoiser, checkpoint, torch.bfloat16)

    @pytest.mark.parametrize("name", ["dit_ltx2_0/case_t2v", "dit_ltx2_0/case_i2v", "dit_ltx2_0/case_masked"])
    def test_steps_of_two_clips_are_the_calls_to_the_bit(self, name, loaded, golden):
        denoiser, _ = loaded
        case, replayed = golden(name), GraphedDenoiser(denoiser, MANY)
        streams = moved(case.video, "cuda"), moved(case.audio, "cuda")
        texts = [streams, tuple(with_other_text(stream) for stream in streams)]
        kept = [denoiser.prepare(*each) for each in texts]
        for clip in (0, 1, 0):
            assert_steps_equal(replayed, denoiser, texts[clip], kept[clip], steps=6)
        assert replayed.num_graphs == 1

    def test_adapters_end_the_graphs(self, loaded, golden, fixtures):
        denoiser, fused = loaded
        case, replayed = golden("dit_ltx2_0/case_t2v"), GraphedDenoiser(denoiser, MANY)
        streams = moved(case.video, "cuda"), moved(case.audio, "cuda")
        for adapters in ([], [(fixtures / "lora" / "lora_a.safetensors", 0.8)], []):
            fused.use(adapters)
            # In the memory of the weights that were replaced: a graph over them would show it.
            left = [torch.full(p.shape, torch.nan, dtype=torch.bfloat16, device="cuda") for p in denoiser.parameters()]
            assert_steps_equal(replayed, denoiser, streams, denoiser.prepare(*streams))
            assert replayed.num_graphs == 1 and left

    def test_steps_of_a_denoiser_that_waits_on_the_host_between_stages_are_the_calls(self, loaded, golden):
        denoiser, _ = loaded
        case, replayed = golden("dit_ltx2_0/case_t2v"), GraphedDenoiser(denoiser, MANY)
        streams, residency = (moved(case.video, "cuda"), moved(case.audio, "cuda")), Residency("cuda", ["denoiser"])
        residency.keep("denoiser", denoiser)
        for _ in range(3):
            with residency.using("denoiser"):
                assert_steps_equal(replayed, denoiser, streams, denoiser.prepare(*streams))

    def test_another_thread_may_wait_and_allocate_while_a_call_is_captured(self, loaded, golden):
        denoiser, _ = loaded
        case, stopped, num_turns = golden("dit_ltx2_0/case_t2v"), threading.Event(), 0
        streams = moved(case.video, "cuda"), moved(case.audio, "cuda")
        conditioning = denoiser.prepare(*streams)

        def encode():
            nonlocal num_turns
            while not stopped.is_set():
                torch.ones(1 << 20, device="cuda").to("cpu", non_blocking=True)
                torch.empty(1 << 20, pin_memory=True)
                event = torch.cuda.Event()
                event.record()
                event.synchronize()
                num_turns += 1

        thread = threading.Thread(target=encode)
        thread.start()
        try:
            for _ in range(10):
                replayed = GraphedDenoiser(denoiser, MANY)
                assert_steps_equal(replayed, denoiser, streams, conditioning)
                assert replayed.num_graphs == 1
        finally:
            stopped.set()
            thread.join()
        assert num_turns

    def test_without_memory_for_a_graph_the_call_runs_as_it_is_on_the_callers_stream(self, loaded, golden):
        denoiser, _ = loaded
        case = golden("dit_ltx2_0/case_t2v")
        streams = moved(case.video, "cuda"), moved(case.audio, "cuda")
        conditioning, failures = denoiser.prepare(*streams), 1

        def record(call):
            def short_of_memory():
                nonlocal failures
                velocities = call()
                if failures:
                    failures -= 1
                    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
                return velocities

            return ON_CUDA.record(short_of_memory)

        replayed = GraphedDenoiser(denoiser, MANY, recorder=Recorder("cuda", record))
        before = torch.cuda.current_stream()
        assert_steps_equal(replayed, denoiser, streams, conditioning)
        assert replayed.num_graphs == 0 and torch.cuda.current_stream() == before
        replayed.forget()
        assert_steps_equal(replayed, denoiser, streams, conditioning)
        assert replayed.num_graphs == 1
