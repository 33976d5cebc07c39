"""The MP4 writer: chunks of frames and a waveform in, one H.264 + AAC file out, the same bytes every time.

The caller's thread produces frames, a background thread encodes them, a one-slot queue lies between: decoder and
encoder overlap and memory is a chunk, not a clip. Knows nothing of requests or storage, and reads nothing back
(`probe.py` does).
"""

from __future__ import annotations

import errno
import math
import os
import platform
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from pipeline.errors import EngineFault, StorageFull
from pipeline.media.picture import picture_of
from pipeline.records.frames import YuvFrames

AAC_FRAME_SAMPLES = 1024
# 1000/1001 of these are what people mean by 23.976, 29.97, 47.952, 59.94 and 119.88.
NTSC_NOMINAL_RATES = (24, 30, 48, 60, 120)
# Durations are 32-bit counts of this unit: at least seven minutes.
MAX_TIMESCALE = 10_000_000

# x264 core 165 with AVX-512 and macroblock tree gives other bytes from run to run (192x128: 232 of 300 encodes
# deviate; 96x64 on one thread: 26 of 500). Capped at SSE4.2 none does, at the same speed (1280x704: 3.1 s and 3.3 s).
REPRODUCIBLE_ASM = ":asm=sse4.2" if platform.machine().lower() in ("x86_64", "amd64") else ""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What the encoders are told. Every field changes the file's bytes."""

    preset: str
    crf: int
    x264_threads: int
    audio_bitrate_kbps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodeReport:
    """What writing a clip took, and its first frame for the thumbnail."""

    encode_busy_s: float
    num_frames: int
    first_frame: YuvFrames


@dataclass(frozen=True, kw_only=True, eq=False)
class _Clip:
    """One file to write; `sound` is float32 (channels, samples) and already as long as the picture, None if silent."""

    path: Path
    rate: Fraction
    num_frames: int
    sound: np.ndarray | None
    sample_rate_hz: int
    settings: EncodeSettings


def write_clip(
    path: Path,
    frames: Iterator[YuvFrames],
    waveform: np.ndarray | None,
    *,
    fps: float,
    num_frames: int,
    sample_rate_hz: int,
    settings: EncodeSettings,
) -> EncodeReport:
    """Write a clip to `path` (local, seekable) and sync it to disk.

    `frames` yields chunks of any number of frames and is consumed on the calling thread;
    `waveform` is float32 (1 or 2 channels, samples) in [-1, 1], padded with silence or cut to num_frames / fps; with
    None, and `sample_rate_hz` 0, the file has no sound track.
    Raises EngineFault (frames or sound are not what was announced), StorageFull, and whatever `frames` raises. After
    any exception, KeyboardInterrupt included, no file is left and `frames` is closed.
    """
    rate = exact_rate(fps)
    sound = None if waveform is None else _fit_sound(waveform, round(num_frames / rate * sample_rate_hz))
    clip = _Clip(
        path=path, rate=rate, num_frames=num_frames, sound=sound, sample_rate_hz=sample_rate_hz, settings=settings
    )
    encoder = _EncoderThread(clip)
    try:
        for chunk in frames:
            encoder.put(chunk)
            # Otherwise the chunk just handed over stays in memory while the next one is made.
            del chunk
        report = encoder.finish()
        with _full_disk_named(path), path.open("rb") as written:
            os.fsync(written.fileno())
    except BaseException:
        encoder.abort()
        path.unlink(missing_ok=True)
        raise
    finally:
        if hasattr(frames, "close"):
            cast(Any, frames).close()
    return report


def exact_rate(fps: float) -> Fraction:
    """Frame rate as the fraction meant: 29.97 is 30000/1001, 12.5 is 25/2. ValueError if not positive."""
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    for nominal in NTSC_NOMINAL_RATES:
        ntsc = Fraction(nominal * 1000, 1001)
        if math.isclose(fps, ntsc, rel_tol=1e-5):
            return ntsc
    return Fraction(fps).limit_denominator(1001)


def _fit_sound(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    if waveform.ndim != 2 or waveform.shape[0] not in (1, 2):
        raise EngineFault(f"sound must be (1 or 2 channels, samples), got shape {waveform.shape}")
    if not np.isfinite(waveform).all():
        raise EngineFault("sound must be finite, got NaN or infinity")
    missing = max(0, num_samples - waveform.shape[1])
    sound = np.clip(waveform[:, :num_samples].astype(np.float32), -1.0, 1.0)
    return np.pad(sound, ((0, 0), (0, missing)))


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_bytes = shutil.disk_usage(path.parent).free
        raise StorageFull(
            f"no space left while writing {path}: {free_bytes} bytes are free; free some or choose another folder"
        ) from error


class _EncoderThread:
    """Encodes one clip on its own thread, fed through a queue that holds one chunk."""

    def __init__(self, clip: _Clip) -> None:
        self._clip = clip
        self._slot: queue.Queue[YuvFrames | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._all_taken = False
        self._waited_s = 0.0
        self._report: EncodeReport | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
        self._thread.start()

    def put(self, chunk: YuvFrames) -> None:
        """Hand over a chunk, waiting for the slot; raises what the encoder raised, if it did."""
        self._slot.put(chunk)
        if self._error is not None:
            raise self._error

    def finish(self) -> EncodeReport:
        self._slot.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def abort(self) -> None:
        """Stop encoding and wait until the file is closed; harmless after the thread has ended."""
        self._stop.set()
        while self._thread.is_alive():
            # The slot may be full and the thread busy; or empty and the thread waiting for it.
            try:
                self._slot.put(None, timeout=0.05)
            except queue.Full:
                continue
            self._thread.join()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            with _full_disk_named(self._clip.path):
                first_frame = _encode(self._clip, self._frames())
            busy_s = time.perf_counter() - started - self._waited_s
            self._report = EncodeReport(encode_busy_s=busy_s, num_frames=self._clip.num_frames, first_frame=first_frame)
        except BaseException as error:  # noqa: BLE001 (raised again on the caller's thread by put or finish)
            self._error = error
            # The caller may be waiting for the slot, and learns of the error once it is free.
            while not (self._all_taken or self._stop.is_set()):
                self._all_taken = self._slot.get() is None

    def _frames(self) -> Iterator[YuvFrames]:
        while True:
            waiting_since = time.perf_counter()
            chunk = self._slot.get()
            self._waited_s += time.perf_counter() - waiting_since
            if chunk is None:
                self._all_taken = True
                return
            _require_whole_planes(chunk.planes)
            for index in range(chunk.num_frames):
                if self._stop.is_set():
                    return
                yield YuvFrames(chunk.planes[index : index + 1])
            del chunk


def _require_whole_planes(planes: np.ndarray) -> None:
    if planes.dtype != np.uint8 or planes.ndim != 3 or planes.shape[1] % 3 or planes.shape[2] % 2:
        raise EngineFault(
            f"frames must be uint8 (frames, 3/2 height, width) of even sides, got {planes.dtype} {planes.shape}"
        )


def _encode(clip: _Clip, frames: Iterator[YuvFrames]) -> YuvFrames:
    """Write the whole file; gives back a copy of the first frame."""
    # The edit list, which hides the AAC priming and sets both durations, counts in this unit: in the default unit
    # of a millisecond the tracks end up to a millisecond apart. Rates too odd to share a unit keep whole samples.
    common = math.lcm(clip.rate.numerator, clip.sample_rate_hz or 1)
    movie_timescale = common if common <= MAX_TIMESCALE else clip.sample_rate_hz
    options = {"movflags": "+faststart", "fflags": "+bitexact", "movie_timescale": str(movie_timescale)}
    with av.open(str(clip.path), "w", format="mp4", container_options=options) as container:
        picture: _Picture | None = None
        sound: _Sound | None = None
        for frame in frames:
            if picture is None:
                picture = _Picture(container, clip, frame)
                sound = None if clip.sound is None else _Sound(container, clip, clip.sound)
            picture.add(frame)
            if sound is not None:
                # In step with the picture, so that the muxer interleaves the tracks and buffers little.
                sound.add_until(math.floor(picture.num_frames / clip.rate * clip.sample_rate_hz))
        if picture is None or picture.num_frames < clip.num_frames:
            got = picture.num_frames if picture else 0
            raise EngineFault(f"expected {clip.num_frames} frames, got {got}")
        picture.finish()
        if sound is not None:
            sound.finish()
    return picture.first_frame


class _Picture:
    """The H.264 track: frames, one at a time, and their packets into the container."""

    def __init__(self, container: OutputContainer, clip: _Clip, first_frame: YuvFrames) -> None:
        settings = clip.settings
        # Threads that look ahead, of which x264 itself takes half as many. On 16 cores a natural clip of 1920x1088x121
        # took 12 threads 1.33 s with two ahead and 1.22 with four, 24 threads 0.96 with four and 0.93 with eight.
        ahead = max(1, settings.x264_threads // 3)
        options = {
            "preset": settings.preset,
            "crf": str(settings.crf),
            "x264-params": (
                f"threads={settings.x264_threads}:lookahead-threads={ahead}:sliced-threads=0{REPRODUCIBLE_ASM}"
            ),
            "flags": "+bitexact",
        }
        stream = container.add_stream("libx264", rate=clip.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = first_frame.width, first_frame.height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / clip.rate
        context.thread_count = settings.x264_threads
        # What `YuvFrames` are. Where their colours are sampled is what a player takes if it is not told.
        context.color_range = ColorRange.MPEG
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        self._container: OutputContainer = container
        self._stream: VideoStream = stream
        self._num_expected = clip.num_frames
        self.num_frames = 0
        # A copy: a view would keep the whole first chunk in memory.
        self.first_frame = YuvFrames(first_frame.planes.copy())

    def add(self, frame: YuvFrames) -> None:
        size, first_size = (f"{image.width}x{image.height}" for image in (frame, self.first_frame))
        if size != first_size:
            raise EngineFault(f"frame {self.num_frames} must be {first_size} like the first one, got {size}")
        if self.num_frames == self._num_expected:
            raise EngineFault(f"expected {self._num_expected} frames, got more")
        picture = picture_of(frame, 0)
        picture.pts = self.num_frames
        picture.time_base = cast(Fraction, self._stream.codec_context.time_base)
        self.num_frames += 1
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode())


class _Sound:
    """The AAC track: the waveform in frames of 1024 samples, the last one shorter so that it ends on the sample."""

    def __init__(self, container: OutputContainer, clip: _Clip, waveform: np.ndarray) -> None:
        self._layout = "mono" if waveform.shape[0] == 1 else "stereo"
        stream = container.add_stream("aac", rate=clip.sample_rate_hz, options={"flags": "+bitexact"})
        stream.codec_context.layout = self._layout
        stream.codec_context.bit_rate = clip.settings.audio_bitrate_kbps * 1000
        self._container: OutputContainer = container
        self._stream: AudioStream = stream
        self._waveform = waveform
        self._sample_rate_hz = clip.sample_rate_hz
        self._num_samples = 0

    def add_until(self, end_sample: int) -> None:
        while self._num_samples + AAC_FRAME_SAMPLES <= end_sample:
            self._add(AAC_FRAME_SAMPLES)

    def finish(self) -> None:
        total = self._waveform.shape[1]
        self.add_until(total)
        if self._num_samples < total:
            self._add(total - self._num_samples)
        self._container.mux(self._stream.encode())

    def _add(self, num_samples: int) -> None:
        samples = self._waveform[:, self._num_samples : self._num_samples + num_samples]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate = self._sample_rate_hz
        frame.pts = self._num_samples
        frame.time_base = Fraction(1, self._sample_rate_hz)
        self._num_samples += num_samples
        self._container.mux(self._stream.encode(frame))
