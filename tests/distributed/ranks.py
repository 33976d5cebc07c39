"""Processes that are ranks of one world after another, and what they compute there.

They are started once, because that takes seconds; each world is left before the next is joined.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.config.recipe import StageConfig
from pipeline.engine.components.text import TextContext
from pipeline.engine.conditions import HeldPicture, append_tokens, hold_to, num_appended_tokens
from pipeline.engine.denoise import PassSpread, Scene, Texts, compute_all, denoise
from pipeline.engine.latents import Tokens, seeded_noise
from pipeline.geometry import LatentShape
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.denoiser import AudioVideoDenoiser, Denoiser
from pipeline.model.streams import Perturbation, TokenStream
from pipeline.parallel.guidance import SpreadPasses
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.sequence import SequenceParallelDenoiser
from pipeline.parallel.start import joined
from pipeline.records.gang import Member
from pipeline.records.parallel import ParallelLayout


@dataclass(frozen=True)
class Raised:
    """What a rank's work ended with, if not with a result, and after how long."""

    error: str
    message: str
    after_s: float


class Ranks:
    """`num` processes; `run` makes the first of them the ranks of a layout."""

    def __init__(self, num: int, device: str = "cpu") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "safetensors.torch"])
        self._pipes, self._processes = [], []
        for _ in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, device), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, layout: str, function: Callable[..., Any], *args: Any, timeout_s: float = 20.0, needs: str | None = None
    ) -> list[Any]:
        """What `function(groups, *args)` gave on each rank; groups are those of the layout `needs`, if it is given."""
        num = ParallelLayout.named(layout).num_gpus
        pipes = self._pipes[:num]
        _send(pipes[0], "listen")
        port = _receive(pipes[0])
        for rank, pipe in enumerate(pipes):
            _send(pipe, (Member(rank, num, "127.0.0.1", port), needs or layout, timeout_s, function, args))
        return [_receive(pipe) for pipe in pipes]

    def stop(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            _send(pipe, None)
            process.join(10)


def require_gpus(layout: str) -> None:
    """Skip the test where there are too few for the layout."""
    num_gpus = ParallelLayout.named(layout).num_gpus
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"{layout} needs {num_gpus} GPUs of one host, got {torch.cuda.device_count()}")


def serve(pipe: Connection, device: str) -> None:
    torch.set_num_threads(1)
    listening: socket.socket | None = None
    while (task := _receive(pipe)) is not None:
        if task == "listen":
            listening = socket.create_server(("127.0.0.1", 0))
            _send(pipe, listening.getsockname()[1])
            continue
        member, *rest = task
        if member.is_leader:
            member = replace(member, listen_fd=listening.detach())
        _send(pipe, _answer(member, device if device == "cpu" else f"{device}:{member.rank}", *rest))


def _answer(
    member: Member, device: str, layout: str, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    begin = time.monotonic()
    try:
        with torch.inference_mode(), joined(member, ParallelLayout.named(layout), device, timeout_s) as groups:
            begin = time.monotonic()
            return function(groups, *args)
    except Exception as error:  # noqa: BLE001 - it is the answer
        return Raised(type(error).__name__, str(error), time.monotonic() - begin)


def _send(pipe: Connection, value: Any) -> None:
    # By value: torch's own way of sending tensors between processes leaves them in shared memory.
    pipe.send_bytes(pickle.dumps(value))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


@dataclass(frozen=True)
class Call:
    """What one call of a denoiser is given."""

    model: Path
    video: TokenStream | None
    audio: TokenStream | None
    perturbations: tuple[Perturbation, ...] | None = None

    def velocities(self, denoiser: Denoiser) -> tuple[Tensor | None, Tensor | None]:
        return denoiser(self.video, self.audio, None, self.perturbations)


def spread_calls(groups: RankGroups, calls: Mapping[str, Call]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    return {name: call.velocities(spread_over(groups, call.model)) for name, call in calls.items()}


@cache
def loaded(model: Path) -> AudioVideoDenoiser:
    return load_denoiser(CheckpointFile(model), reference_ops(), "cpu", torch.float32)


def spread_over(groups: RankGroups, model: Path) -> SequenceParallelDenoiser:
    return SequenceParallelDenoiser(copy.deepcopy(loaded(model)), groups, reference_ops().attention_with_lse)


@dataclass(frozen=True)
class Clip:
    """A stage of denoising: its size in tokens, and pictures that it is held to at frame -> strength."""

    model: Path
    stage: StageConfig
    shape: LatentShape
    pictures: tuple[tuple[int, float], ...] = ()

    def denoised(self, denoiser: Denoiser, spread: PassSpread = compute_all) -> tuple[Tensor, Tensor | None]:
        hparams = denoiser.hparams
        draw = seeded_noise(1)
        shape, audio = self.shape, hparams.audio
        video_BTC = draw((1, shape.num_video_tokens, hparams.video.in_channels))
        audio_BTC = None if audio is None else draw((1, shape.num_audio_latents, audio.in_channels))
        frames = [frame for frame, _ in self.pictures]
        start = append_tokens(Tokens(video_BTC, audio_BTC), num_appended_tokens(frames, shape))
        latents = (1, hparams.video.in_channels, 1, shape.height, shape.width)
        hold = hold_to([HeldPicture(draw(latents), *picture) for picture in self.pictures], start, shape)
        if hold is not None:
            start = Tokens(hold.blend(start.video_BTC), start.audio_BTC)

        def text(width: int | None) -> Tensor | None:
            return None if width is None else draw((1, 16, width))

        video_width = hparams.text_channels or hparams.video.width
        audio_width = None if audio is None else hparams.text_channels or audio.width
        texts = Texts(*(TextContext(text(video_width), text(audio_width)) for _ in range(2)))
        end = denoise(denoiser, start, Scene(shape, texts, hold), self.stage, draw, spread=spread)
        return end.video_BTC, end.audio_BTC


def spread_clips(groups: RankGroups, clips: Mapping[str, Clip]) -> dict[str, tuple[Tensor, Tensor | None]]:
    spread = SpreadPasses(groups.guidance)
    return {name: clip.denoised(spread_over(groups, clip.model), spread) for name, clip in clips.items()}
