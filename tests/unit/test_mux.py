"""The MP4 writer: what is in the file, that its bytes repeat, and that no failure leaves a file or a thread."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.errors import EngineFault, StorageFull
from pipeline.media.mux import AAC_FRAME_SAMPLES, EncodeReport, EncodeSettings, exact_rate, write_clip
from pipeline.media.probe import check_clip, probe_clip
from pipeline.records.frames import YuvFrames

SETTINGS = EncodeSettings(preset="veryfast", crf=18, x264_threads=2, audio_bitrate_kbps=128)
HEIGHT, WIDTH = 128, 192


def moving_chunks(num_frames: int, chunk: int = 4, *, height: int = HEIGHT, width: int = WIDTH) -> Iterator[YuvFrames]:
    """Smooth motion with grain: the content and size on which x264's AVX-512 code gives other bytes each run."""
    grain = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    for start in range(0, num_frames, chunk):
        frames = [
            128 + 60 * np.sin((x + 3 * i) / 17) + 30 * np.cos((y - 2 * i) / 11) + grain.normal(0, 4, x.shape)
            for i in range(start, min(num_frames, start + chunk))
        ]
        yield grey(np.stack(frames).clip(16, 235).astype(np.uint8))


def grey(luma: np.ndarray) -> YuvFrames:
    neutral = np.full_like(luma[:, ::2, ::2], 128)
    return YuvFrames.joined(luma, neutral, neutral)


def tone(num_samples: int, sample_rate_hz: int, channels: int = 2) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / sample_rate_hz)
    return np.repeat(wave[None], channels, axis=0).astype(np.float32)


def write(
    path: Path,
    frames: Iterator[YuvFrames],
    *,
    num_frames: int,
    fps: float = 24.0,
    sound: np.ndarray | None = None,
    sample_rate_hz: int = 24000,
) -> EncodeReport:
    waveform = tone(sample_rate_hz, sample_rate_hz) if sound is None else sound
    return write_clip(
        path, frames, waveform, fps=fps, num_frames=num_frames, sample_rate_hz=sample_rate_hz, settings=SETTINGS
    )


def decoded_sound(path: Path) -> np.ndarray:
    """(channels, samples) as a player plays it: from time 0 on."""
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def encoder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "encode"]


@pytest.mark.parametrize(
    ("fps", "num_frames", "sample_rate_hz"),
    [(24.0, 25, 24000), (24.0, 9, 16000), (25.0, 1, 48000), (29.97, 17, 48000), (23.976, 9, 24000), (7.3, 9, 48000)],
)
def test_both_tracks_start_at_zero_and_end_together(
    tmp_path: Path, fps: float, num_frames: int, sample_rate_hz: int
) -> None:
    path = tmp_path / "a.mp4"
    write(path, moving_chunks(num_frames), num_frames=num_frames, fps=fps, sample_rate_hz=sample_rate_hz)
    with av.open(str(path)) as container:
        tracks = [container.streams.video[0], container.streams.audio[0]]
        starts = [track.start_time for track in tracks]
        video_s, audio_s = (Fraction(track.duration or 0) * (track.time_base or 0) for track in tracks)
        first_frame = next(container.decode(video=0))
        assert first_frame.pts == 0
    assert starts == [0, 0]
    assert video_s == num_frames / exact_rate(fps)
    assert abs(video_s - audio_s) <= Fraction(1, 2 * sample_rate_hz)
    assert abs(video_s - audio_s) < Fraction(AAC_FRAME_SAMPLES, sample_rate_hz)


def test_two_encodes_of_the_same_input_are_byte_identical(tmp_path: Path) -> None:
    # Without the cap on x264's vector code, two of three encodes of this input deviate.
    files: set[bytes] = set()
    for attempt in range(12):
        path = tmp_path / f"{attempt}.mp4"
        write(path, moving_chunks(25), num_frames=25)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_chunking_of_the_frames_does_not_change_the_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving_chunks(9, chunk=1), num_frames=9)
    write(tmp_path / "b.mp4", moving_chunks(9, chunk=9), num_frames=9)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_index_comes_before_the_media_data(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving_chunks(9), num_frames=9)
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("num_samples", [0, 1000, 90_000])
def test_sound_is_padded_or_cut_to_the_picture(tmp_path: Path, num_samples: int) -> None:
    path = tmp_path / "a.mp4"
    write(path, moving_chunks(25), num_frames=25, sound=tone(num_samples, 24000))
    assert probe_clip(path).audio_duration_s == pytest.approx(25 / 24, abs=1 / 24000)
    played = decoded_sound(path)
    assert np.abs(played[:, num_samples + AAC_FRAME_SAMPLES : 25_000]).max(initial=0.0) < 0.02


def test_a_model_without_sound_gives_a_clip_without_a_sound_track(tmp_path: Path) -> None:
    path = tmp_path / "silent.mp4"
    write_clip(path, moving_chunks(9), None, fps=29.97, num_frames=9, sample_rate_hz=0, settings=SETTINGS)
    facts = probe_clip(path)
    assert not facts.has_audio and facts.video_start_s == 0 and facts.num_frames == 9
    check_clip(facts, width=WIDTH, height=HEIGHT, num_frames=9, fps=29.97, sample_rate_hz=0)
    with pytest.raises(EngineFault, match="audio_codec must be aac, got none"):
        check_clip(facts, width=WIDTH, height=HEIGHT, num_frames=9, fps=29.97, sample_rate_hz=24000)


def test_a_click_is_heard_at_the_sample_where_it_was_put(tmp_path: Path) -> None:
    click = np.zeros((1, 24000), np.float32)
    click[0, 5000:5004] = 0.9
    write(tmp_path / "a.mp4", moving_chunks(25), num_frames=25, sound=click)
    assert abs(int(np.abs(decoded_sound(tmp_path / "a.mp4")[0]).argmax()) - 5001) <= 3


@pytest.mark.parametrize("yuv", [(16, 128, 128), (235, 128, 128), (63, 102, 240), (94, 142, 173)])
def test_planes_are_written_as_they_are_and_tagged_limited_range_bt709(
    tmp_path: Path, yuv: tuple[int, int, int]
) -> None:
    planes = [np.full((1, 64 // size, 64 // size), level, np.uint8) for level, size in zip(yuv, (1, 2, 2), strict=True)]
    write(tmp_path / "a.mp4", iter([YuvFrames.joined(*planes)]), num_frames=1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_range, context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        read = YuvFrames(next(container.decode(video=0)).to_ndarray()[None])
    assert [plane.mean() for plane in (read.y, read.u, read.v)] == pytest.approx(yuv, abs=1.5)


def test_every_place_of_every_plane_is_written_where_rows_are_padded_in_memory(tmp_path: Path) -> None:
    """A width that is no multiple of what the library aligns rows to."""
    y, x = np.mgrid[:66, :90]
    luma = (60 + y + x).astype(np.uint8)[None]
    frames = YuvFrames.joined(luma, luma[:, ::2, ::2] // 2 + 60, 255 - luma[:, ::2, ::2] // 2)
    write(tmp_path / "a.mp4", iter([frames]), num_frames=1)
    with av.open(str(tmp_path / "a.mp4")) as container:
        read = YuvFrames(next(container.decode(video=0)).to_ndarray()[None])
    for written, found in zip((frames.y, frames.u, frames.v), (read.y, read.u, read.v), strict=True):
        assert np.abs(written.astype(int) - found).max() <= 8
        assert np.abs(written.astype(int) - found).mean() < 1


def test_report_holds_the_first_frame_as_it_was_given(tmp_path: Path) -> None:
    report = write(tmp_path / "a.mp4", moving_chunks(9), num_frames=9)
    assert np.array_equal(report.first_frame.planes, next(moving_chunks(9)).planes[:1])
    assert report.num_frames == 9
    assert report.encode_busy_s > 0


@pytest.mark.parametrize(("given", "message"), [(8, "expected 9 frames, got 8"), (17, "expected 9 frames, got more")])
def test_wrong_frame_count_is_a_fault_and_leaves_no_file(tmp_path: Path, given: int, message: str) -> None:
    with pytest.raises(EngineFault, match=message):
        write(tmp_path / "a.mp4", moving_chunks(given), num_frames=9)
    assert list(tmp_path.iterdir()) == []


def test_odd_and_changing_sizes_are_faults_that_name_both_sizes(tmp_path: Path) -> None:
    for size in ((96, 65), (97, 64)):
        with pytest.raises(EngineFault, match=rf"of even sides, got uint8 \(1, {size[0]}, {size[1]}\)"):
            write(tmp_path / "a.mp4", iter([YuvFrames(np.zeros((1, *size), np.uint8))]), num_frames=1)
    mixed = iter([YuvFrames(np.zeros((1, 96, width), np.uint8)) for width in (64, 96)])
    with pytest.raises(EngineFault, match="frame 1 must be 64x64 like the first one, got 96x64"):
        write(tmp_path / "a.mp4", mixed, num_frames=2)
    assert list(tmp_path.iterdir()) == []


def test_sound_that_is_not_finite_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="finite"):
        write(tmp_path / "a.mp4", moving_chunks(1), num_frames=1, sound=np.full((2, 100), np.nan, np.float32))


@pytest.mark.parametrize("error", [RuntimeError("decoder"), KeyboardInterrupt()])
def test_failing_decoder_stops_the_encoder_and_leaves_no_file(tmp_path: Path, error: BaseException) -> None:
    def frames() -> Iterator[YuvFrames]:
        yield from moving_chunks(8)
        raise error

    with pytest.raises(type(error)):
        write(tmp_path / "a.mp4", frames(), num_frames=25)
    assert list(tmp_path.iterdir()) == []
    assert encoder_threads() == []


def test_failing_encoder_stops_and_closes_the_decoder(tmp_path: Path) -> None:
    made, closed = [0], [False]

    def frames() -> Iterator[YuvFrames]:
        try:
            while True:
                made[0] += 1
                yield YuvFrames(np.zeros((1, 96, 65), np.uint8))
        finally:
            closed[0] = True

    with pytest.raises(EngineFault, match="even"):
        write(tmp_path / "a.mp4", frames(), num_frames=1000)
    assert made[0] < 20
    assert closed == [True]
    assert encoder_threads() == []


def test_full_disk_stops_the_job_and_says_where(tmp_path: Path) -> None:
    # Writing to /dev/full fails as a full disk does, through ffmpeg's own output.
    path = tmp_path / "a.mp4"
    path.symlink_to("/dev/full")
    with pytest.raises(StorageFull, match=rf"{path}: \d+ bytes are free") as raised:
        write(path, moving_chunks(25, height=256, width=256), num_frames=25)
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_other_storage_errors_keep_their_class(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "a.mp4", moving_chunks(1), num_frames=1)


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24.0, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (29.969999313354492, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (1 / 3, Fraction(1, 3)),
    ],
)
def test_decimal_rates_become_the_fraction_that_was_meant(fps: float, rate: Fraction) -> None:
    assert exact_rate(fps) == rate


def test_bytes_repeat_with_as_many_threads_as_shipped(tmp_path: Path) -> None:
    """24, eight of which look ahead, at a size at which x264 takes them all."""
    settings = EncodeSettings(preset="veryfast", crf=18, x264_threads=24, audio_bitrate_kbps=128)
    chunks, written = list(moving_chunks(33, height=832, width=192)), set()
    for number in range(6):
        path = tmp_path / f"{number}.mp4"
        write_clip(path, iter(chunks), None, fps=24.0, num_frames=33, sample_rate_hz=0, settings=settings)
        written.add(path.read_bytes())
    assert len(written) == 1
