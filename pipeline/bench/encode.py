"""Seconds of writing a clip with x264: of a picture that moves as filmed ones do, and of noise, which is the worst.

On the host alone, where in a batch a GPU is with the next clip meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.bench.rows import Row, new_row
from pipeline.bench.timing import spread
from pipeline.config.recipe import EncodeConfig
from pipeline.media.mux import EncodeSettings, write_clip
from pipeline.media.natural_clip import FPS, EncodeTiming, time_encode
from pipeline.records.frames import YuvFrames

_SEED = 20261120
# Of limited range.
_LEVELS = (16, 236)
_CHUNK_FRAMES = 8
# Noise takes x264 ten seconds at 1920x1088, all of which a GPU is held.
_TURNS = 3


def measure_encode(encode: EncodeConfig, *, width: int, height: int, num_frames: int) -> Row:
    """Both clips in turns, without sound."""
    settings = EncodeSettings(preset=encode.preset, crf=encode.crf, x264_threads=encode.x264_threads,
                              audio_bitrate_kbps=encode.audio_bitrate_kbps)  # fmt: skip
    timers = {
        name: partial(timer, width=width, height=height, num_frames=num_frames)
        for name, timer in (("natural", time_encode), ("noise", _time_noise))
    }
    found: dict[str, list[EncodeTiming]] = {name: [] for name in timers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(_TURNS):
            for name, timer in timers.items():
                found[name].append(timer(Path(folder) / f"{name}.mp4", settings))
    contestants = {
        name: {**spread([timing.encode_s for timing in timings]), "size_bytes": timings[-1].size_bytes}
        for name, timings in found.items()
    }
    shape = f"{width}x{height}x{num_frames}"
    return new_row("encode", shape=shape, settings=asdict(settings), contestants=contestants)


def _time_noise(path: Path, settings: EncodeSettings, *, width: int, height: int, num_frames: int) -> EncodeTiming:
    chunks = list(noise_clip(width, height, num_frames))
    report = write_clip(path, iter(chunks), None, fps=FPS, num_frames=num_frames, sample_rate_hz=0, settings=settings)
    return EncodeTiming(report.encode_busy_s, num_frames, path.stat().st_size)


def noise_clip(width: int, height: int, num_frames: int) -> Iterator[YuvFrames]:
    """Chunks of frames of which no two levels are alike but by chance; the same every time."""
    generator = np.random.default_rng(_SEED)
    for first in range(0, num_frames, _CHUNK_FRAMES):
        size = (min(_CHUNK_FRAMES, num_frames - first), height * 3 // 2, width)
        yield YuvFrames(generator.integers(*_LEVELS, size, dtype=np.uint8))
