"""Reads a written clip back, to its last frame and sample, and says what it is and whether it is what was asked.

Trusts nothing the writer believed: counts are of decoded frames. Writing is in `mux.py`; hashes of other files and
where a clip is kept are not known here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Stream
from av.video.stream import VideoStream

from pipeline.errors import EngineFault

# Container times are exact to a tick of the track; a decimal fps such as 29.97 is off by 1e-6 of its value.
FPS_TOLERANCE = 1e-3
START_TOLERANCE_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What a file holds. `duration_s` is the video track's; starts are of the first frame and sample shown."""

    sha256: str
    size_bytes: int
    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    video_codec: str
    video_start_s: float
    has_audio: bool
    # 0 or empty where there is no audio.
    audio_codec: str
    sample_rate_hz: int
    audio_start_s: float
    audio_duration_s: float


def probe_clip(path: Path) -> ClipFacts:
    """Decode the whole file and report it; EngineFault if it cannot be opened or decoded or has no video."""
    try:
        with av.open(str(path)) as container:
            return _read_facts(path, container)
    except FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise EngineFault(f"{path} must be a playable clip, got: {error}") from error


def check_clip(facts: ClipFacts, *, width: int, height: int, num_frames: int, fps: float, sample_rate_hz: int) -> None:
    """Compare a clip with what was asked; EngineFault listing every deviation, in asked and found values.

    `sample_rate_hz` 0 asks for a clip without sound.
    """
    duration_s = num_frames / fps
    frame_s = 1 / fps
    checks = [
        ("width", width, facts.width, 0.0),
        ("height", height, facts.height, 0.0),
        ("num_frames", num_frames, facts.num_frames, 0.0),
        ("fps", fps, facts.fps, FPS_TOLERANCE),
        ("sample_rate_hz", sample_rate_hz, facts.sample_rate_hz, 0.0),
        ("video_start_s", 0.0, facts.video_start_s, START_TOLERANCE_S),
        ("audio_start_s", 0.0, facts.audio_start_s, START_TOLERANCE_S),
        ("duration_s", duration_s, facts.duration_s, frame_s),
        ("audio_duration_s", duration_s if sample_rate_hz else 0.0, facts.audio_duration_s, frame_s),
    ]
    deviations = [
        f"{name} must be {asked}, got {found}" for name, asked, found, slack in checks if abs(found - asked) > slack
    ]
    sound = "aac" if sample_rate_hz else ""
    codecs = [("video_codec", "h264", facts.video_codec), ("audio_codec", sound, facts.audio_codec)]
    deviations += [
        f"{name} must be {asked or 'none'}, got {found or 'none'}" for name, asked, found in codecs if found != asked
    ]
    if deviations:
        raise EngineFault(f"the written clip is not what was asked: {'; '.join(deviations)}")


def _read_facts(path: Path, container: InputContainer) -> ClipFacts:
    if not container.streams.video:
        raise EngineFault(f"{path} must have a video track, got none")
    video = container.streams.video[0]
    video.thread_type = "AUTO"
    audio = container.streams.audio[0] if container.streams.audio else None
    num_frames, num_samples = _decode_all(container, video, audio)
    context = video.codec_context
    sample_rate_hz = audio.codec_context.sample_rate if audio else 0
    return ClipFacts(
        sha256=_sha256(path),
        size_bytes=path.stat().st_size,
        width=context.width,
        height=context.height,
        num_frames=num_frames,
        fps=float(video.average_rate or 0),
        duration_s=_seconds(video, video.duration),
        video_codec=context.name,
        video_start_s=_seconds(video, video.start_time),
        has_audio=audio is not None,
        audio_codec=audio.codec_context.name if audio else "",
        sample_rate_hz=sample_rate_hz,
        audio_start_s=_seconds(audio, audio.start_time) if audio else 0.0,
        # The edit list hides the padding of the last AAC frame; a truncated track has fewer samples than it says.
        audio_duration_s=min(_seconds(audio, audio.duration), num_samples / sample_rate_hz) if audio else 0.0,
    )


def _decode_all(container: InputContainer, video: VideoStream, audio: AudioStream | None) -> tuple[int, int]:
    num_frames = num_samples = 0
    for frame in container.decode(*([video, audio] if audio else [video])):
        if isinstance(frame, av.VideoFrame):
            num_frames += 1
        elif isinstance(frame, av.AudioFrame):
            num_samples += frame.samples
    return num_frames, num_samples


def _seconds(stream: Stream, ticks: int | None) -> float:
    return float((ticks or 0) * stream.time_base) if stream.time_base else 0.0


def _sha256(path: Path) -> str:
    with path.open("rb") as clip:
        return hashlib.file_digest(clip, "sha256").hexdigest()
