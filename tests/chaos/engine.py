"""An engine without a model: clips of moving colour in milliseconds, and rows that do harm as their prompt says.

The worker around it is the real one: encoding, checking, uploading and committing are what a night does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.accord import Consent, alone
from pipeline.assembly.brief import WorkerBrief
from pipeline.config.recipe import RecipeConfig
from pipeline.cost.meter import Meter
from pipeline.errors import OutOfMemory
from pipeline.media.mux import EncodeSettings
from pipeline.records.frames import YuvFrames
from pipeline.records.gang import Member
from pipeline.records.request import RenderRequest
from pipeline.records.work import MEMORY_RUNGS
from pipeline.rendering import FollowingWorker, Renderer
from pipeline.storage.store import Store
from pipeline.worker import ClipFiles, ClipWorker

SAMPLE_RATE_HZ = 24_000
NUM_STEPS = 4
ENCODE = EncodeSettings(preset="ultrafast", crf=30, x264_threads=1, audio_bitrate_kbps=32)


@dataclass(frozen=True)
class ColourStreams:
    """What `engine.Streams` is, without its imports."""

    frames: Generator[YuvFrames, None, None]
    waveform: np.ndarray
    sample_rate_hz: int
    prompt: str


@dataclass(frozen=True)
class NothingFused:
    def check(self, adapters: Any) -> None: ...


@dataclass(frozen=True)
class ColourEngine:
    """Follows the shape and the seed of a request, `step_s` a step."""

    step_s: float
    # What the ranks of a gang do in each step: a collective.
    meet: Callable[[], None] = lambda: None
    fused: NothingFused = field(default_factory=NothingFused)
    text_waits: bool = False

    def render(
        self,
        request: RenderRequest,
        recipe: RecipeConfig,
        on_stage: Callable[[str], None],
        adapters: Any = (),
        *,
        memory_rung: str = MEMORY_RUNGS[0],
        on_step: Callable[[str, int, int], None] = lambda stage, step, num_steps: None,
    ) -> ColourStreams:
        on_stage("denoise")
        for step in range(NUM_STEPS):
            time.sleep(self.step_s)
            self.meet()
            on_step("denoise", step + 1, NUM_STEPS)
            if step == NUM_STEPS // 2:
                do_harm(request.prompt.split(), memory_rung)
        on_stage("decode")
        shape = request.shape.asked
        clock = np.arange(round(shape.num_frames / shape.fps * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
        tone = 0.2 * np.sin(2 * np.pi * (200 + request.seed % 400) * clock, dtype=np.float32)
        return ColourStreams(
            _frames(request, on_step), np.stack([tone, tone]).astype(np.float32), SAMPLE_RATE_HZ, request.prompt
        )


def _frames(request: RenderRequest, on_step: Callable[[str, int, int], None]) -> Generator[YuvFrames, None, None]:
    """Chunks of frames whose colour is the seed's and moves with time."""
    shape = request.shape.asked
    on_step("decode", 0, shape.num_frames)
    generator = np.random.default_rng(request.seed % 2**32)
    base, drift = generator.integers(0, 200, 3), generator.integers(1, 6, 3)
    for first in range(0, shape.num_frames, 8):
        times = np.arange(first, min(first + 8, shape.num_frames))
        colours = ((base + drift * times[:, None]) % 256).astype(np.uint8)
        y, u, v = colours.T[:, :, None, None]
        half = (len(times), shape.height // 2, shape.width // 2)
        picture = np.broadcast_to(y, (len(times), shape.height, shape.width))
        yield YuvFrames.joined(picture, np.broadcast_to(u, half), np.broadcast_to(v, half))
        on_step("decode", first + len(times), shape.num_frames)


def do_harm(words: list[str], memory_rung: str) -> None:
    """What a poison row does in the middle of its steps; nothing for any other prompt."""
    match words[0]:
        case "raise":
            raise ZeroDivisionError("this row divides by zero")
        case "segfault":
            ctypes.string_at(0)
        case "loop":
            while True:
                time.sleep(0.05)
        case "memory":
            np.zeros(2**62, dtype=np.uint8)
        case "killed":  # as the kernel does to whom it finds too large
            os.kill(os.getpid(), signal.SIGKILL)
        case "tight" if memory_rung != words[1]:
            raise OutOfMemory(f"fits on the rung {words[1]} only, got {memory_rung}")


def meeting_of(member: Member) -> Callable[[], None]:
    """An all_reduce over the gang's ranks, on gloo."""
    if member.num_ranks == 1:
        return lambda: None
    # A second of processor time that only gangs need.
    import torch
    import torch.distributed as dist

    store = dist.TCPStore(
        member.host, member.port, member.num_ranks, is_master=member.is_leader, master_listen_fd=member.listen_fd,
        wait_for_workers=False,
    )  # fmt: skip
    dist.init_process_group("gloo", store=store, rank=member.rank, world_size=member.num_ranks)
    return lambda: dist.all_reduce(torch.ones(1))


def build_colour_worker(
    step_s: float, open_output: Callable[..., Store], brief: WorkerBrief, meter: Meter, member: Member
) -> ClipWorker | FollowingWorker:
    """As `assembly.worker_side.build_worker`, with the engine above."""
    meter.enter("weight_load")
    engine = ColourEngine(step_s, meeting_of(member))
    settings = brief.job.storage
    store = open_output(brief.job.output, answer_timeout_s=settings.answer_timeout_s, is_exclusive=brief.is_exclusive)
    scratch = store.scratch(brief.facts.run_id)
    renderer = Renderer(
        engine,  # type: ignore[arg-type] - what the worker uses of one
        brief.recipes, scratch, consent_of(member),
    )  # fmt: skip
    if not member.is_leader:
        return FollowingWorker(renderer, meter, meter.now_ns)
    return ClipWorker(
        renderer=renderer,
        store=store,
        patience_s=settings.patience_s,
        scratch=scratch,
        meter=meter,
        files={name: ClipFiles(ENCODE, 70) for name in brief.recipes},
        facts=brief.facts,
        now_ns=meter.now_ns,
        take_peak_gpu_bytes=lambda: None,
        resume=brief.job.resume,
        commits=brief.is_exclusive,
    )


def consent_of(member: Member) -> Consent:
    """The real one, once the ranks have met."""
    if member.num_ranks == 1:
        return alone
    from pipeline.parallel.consent import GangConsent

    return GangConsent()
