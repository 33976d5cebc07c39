"""The clip that an encoder is timed with has the statistics of filmed pictures, and is the same every time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.media.mux import EncodeSettings, write_clip
from pipeline.media.natural_clip import (
    FPS,
    GRAIN_STD,
    SWING_PX,
    camera_at,
    natural_clip,
    time_encode,
)
from pipeline.media.probe import probe_clip
from pipeline.records.frames import YuvFrames

SETTINGS = EncodeSettings(preset="veryfast", crf=18, x264_threads=2, audio_bitrate_kbps=128)
WIDTH, HEIGHT = 384, 256


def luma_of(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.concatenate([chunk.y for chunk in natural_clip(WIDTH, HEIGHT, num_frames, seed)]).astype(float)


def test_power_falls_with_the_square_of_the_frequency() -> None:
    frame = luma_of(1)[0]
    # Without a window its edges would be a cross of all frequencies.
    window = np.hanning(HEIGHT)[:, None] * np.hanning(WIDTH)[None, :]
    power = np.abs(np.fft.fft2((frame - frame.mean()) * window)) ** 2
    cycles = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH)[None, :])
    edges = np.geomspace(0.02, 0.2, 9)
    rings = [(cycles >= low) & (cycles < high) for low, high in pairwise(edges)]
    means = np.log([(cycles[ring].mean(), power[ring].mean()) for ring in rings])
    slope, _ = np.polyfit(means[:, 0], means[:, 1], 1)
    assert slope == pytest.approx(-2, abs=0.4)


def test_levels_are_those_of_a_picture_with_light_and_shade() -> None:
    (chunk,) = natural_clip(WIDTH, HEIGHT, 1)
    assert 90 < chunk.y.mean() < 130 and 25 < chunk.y.std() < 50
    assert all(100 < plane.mean() < 156 and 5 < plane.std() < 20 for plane in (chunk.u, chunk.v))
    assert np.isin(chunk.y, (16, 235)).mean() < 0.05, "neither black nor burnt out"


def test_the_picture_moves_with_the_camera() -> None:
    frames = luma_of(30)
    first, second = (np.fft.fft2(frame - frame.mean()) for frame in (frames[0], frames[20]))
    across = first.conj() * second
    peak = np.unravel_index(np.abs(np.fft.ifft2(across / np.maximum(np.abs(across), 1e-9))).argmax(), (HEIGHT, WIDTH))
    moved = [(place + size // 2) % size - size // 2 for place, size in zip(peak, (HEIGHT, WIDTH), strict=True)]
    camera = np.subtract(camera_at(0), camera_at(20))
    assert np.abs(camera).max() > 10
    assert moved == pytest.approx(camera, abs=1)


def test_the_camera_never_leaves_the_texture_nor_jumps() -> None:
    path = np.array([camera_at(frame) for frame in range(500)])
    assert path.min() >= 0 and path.max() <= 2 * SWING_PX
    assert 1 < np.abs(np.diff(path, axis=0)).max() < 4


def test_every_frame_has_grain_of_its_own() -> None:
    # After a whole swing the camera is where it was: what differs is grain, twice, and two roundings to levels.
    frames = luma_of(101)
    expected = np.sqrt(2 * (GRAIN_STD**2 + 1 / 12))
    assert (frames[0] - frames[100]).std() == pytest.approx(expected, rel=0.1)


def test_the_same_seed_gives_the_same_bytes_and_another_another_clip() -> None:
    first, again, other = luma_of(3), luma_of(3), luma_of(3, seed=1)
    assert np.array_equal(first, again) and np.abs(first - other).mean() > 10


def test_it_costs_an_encoder_far_fewer_bytes_than_noise(tmp_path: Path) -> None:
    num_frames = 17
    timing = time_encode(tmp_path / "natural.mp4", SETTINGS, width=WIDTH, height=HEIGHT, num_frames=num_frames)
    assert timing.encode_s > 0 and timing.num_frames == num_frames
    assert timing.size_bytes == (tmp_path / "natural.mp4").stat().st_size
    assert probe_clip(tmp_path / "natural.mp4").num_frames == num_frames
    noise = np.random.default_rng(0).integers(16, 236, (num_frames, HEIGHT * 3 // 2, WIDTH), dtype=np.uint8)
    path = tmp_path / "noise.mp4"
    write_clip(
        path, iter([YuvFrames(noise)]), None, fps=FPS, num_frames=num_frames, sample_rate_hz=0, settings=SETTINGS
    )
    assert timing.size_bytes < path.stat().st_size / 3
