"""Reading clips back: the facts are those of decoded frames, every deviation is named, and thumbnails repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import EngineFault
from pipeline.media.mux import EncodeSettings, write_clip
from pipeline.media.probe import ClipFacts, check_clip, probe_clip
from pipeline.media.thumbnail import write_thumbnail
from pipeline.records.frames import YuvFrames

SETTINGS = EncodeSettings(preset="veryfast", crf=18, x264_threads=1, audio_bitrate_kbps=128)


def noise_chunks(num_frames: int) -> Iterator[YuvFrames]:
    source = np.random.default_rng(0)
    for _ in range(num_frames):
        yield YuvFrames(source.integers(16, 236, (1, 96, 96), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "clip.mp4"
    sound = np.zeros((2, 48000), np.float32)
    write_clip(path, noise_chunks(9), sound, fps=29.97, num_frames=9, sample_rate_hz=48000, settings=SETTINGS)
    return path


def check(facts: ClipFacts) -> None:
    check_clip(facts, width=96, height=64, num_frames=9, fps=29.97, sample_rate_hz=48000)


def test_facts_are_those_of_the_file(clip: Path) -> None:
    facts = probe_clip(clip)
    assert facts.sha256 == hashlib.sha256(clip.read_bytes()).hexdigest()
    assert facts.size_bytes == clip.stat().st_size
    assert (facts.width, facts.height, facts.num_frames) == (96, 64, 9)
    assert facts.fps == pytest.approx(29.97, abs=1e-4)
    assert (facts.video_codec, facts.audio_codec, facts.has_audio, facts.sample_rate_hz) == ("h264", "aac", True, 48000)
    assert (facts.video_start_s, facts.audio_start_s) == (0.0, 0.0)
    assert facts.duration_s == pytest.approx(9 * 1001 / 30000, abs=1e-9)
    assert facts.audio_duration_s == pytest.approx(facts.duration_s, abs=1 / 48000)
    check(facts)


def test_truncated_file_does_not_pass(clip: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(EngineFault):
        check(probe_clip(broken))


def test_file_that_is_no_clip_is_a_fault_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("not a clip")
    with pytest.raises(EngineFault, match=r"text\.mp4 must be a playable clip"):
        probe_clip(path)


def test_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe_clip(tmp_path / "nothing.mp4")


def test_every_deviation_is_listed_in_one_message(clip: Path) -> None:
    facts = replace(probe_clip(clip), width=98, num_frames=8, audio_start_s=-0.02, audio_codec="", audio_duration_s=0.2)
    with pytest.raises(EngineFault) as raised:
        check(facts)
    message = str(raised.value)
    for part in (
        "width must be 96, got 98",
        "num_frames must be 9, got 8",
        "audio_start_s must be 0.0, got -0.02",
        "audio_codec must be aac, got none",
        "audio_duration_s must be 0.3",
    ):
        assert part in message
    assert "height" not in message


def test_durations_may_differ_from_the_request_by_less_than_a_frame(clip: Path) -> None:
    facts = probe_clip(clip)
    check(replace(facts, duration_s=9 / 29.97 + 0.03))
    with pytest.raises(EngineFault, match="duration_s must be"):
        check(replace(facts, duration_s=9 / 29.97 + 0.04))


def test_thumbnail_is_reduced_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    frame = YuvFrames(np.random.default_rng(0).integers(16, 236, (1, 450, 800), dtype=np.uint8))
    for name in ("a.jpg", "b.jpg"):
        write_thumbnail(tmp_path / name, frame, quality=85)
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    with Image.open(tmp_path / "a.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (512, 192))


def test_small_frames_are_not_enlarged(tmp_path: Path) -> None:
    write_thumbnail(tmp_path / "a.jpg", YuvFrames(np.full((1, 96, 96), 128, np.uint8)), quality=85)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (96, 64)


@pytest.mark.parametrize(
    ("yuv", "rgb"), [((63, 102, 240), (255, 0, 0)), ((32, 240, 118), (0, 0, 255)), ((235, 128, 128), (255, 255, 255))]
)
def test_thumbnail_has_the_colours_of_the_frame(
    tmp_path: Path, yuv: tuple[int, int, int], rgb: tuple[int, int, int]
) -> None:
    planes = [np.full((1, 64 // size, 64 // size), level, np.uint8) for level, size in zip(yuv, (1, 2, 2), strict=True)]
    write_thumbnail(tmp_path / "a.jpg", YuvFrames.joined(*planes), quality=95)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert np.asarray(picture).mean(axis=(0, 1)) == pytest.approx(rgb, abs=4)
