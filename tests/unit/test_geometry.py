"""Shapes: pixels to latents, frame grid, durations, crops."""

from __future__ import annotations

import json

import pytest

from pipeline.geometry import (
    PixelShape,
    frames_for_duration,
    latent_shape,
    nearest_frame_counts,
    next_on_grid,
    render_shape,
)
from tests import golden

SHAPES = json.loads(golden.read("coords")["latent_shapes.json"])


def test_trap_21_latent_shapes_equal_the_reference() -> None:
    checked = 0
    for case in SHAPES:
        if case["height"] % 32 or case["width"] % 32 or (case["frames"] - 1) % 8:
            continue
        shape = latent_shape(PixelShape(case["frames"], case["height"], case["width"], case["fps"]))
        assert [shape.num_frames, shape.height, shape.width] == case["video_latent"][2:]
        assert shape.num_audio_latents == case["audio_latent"][2]
        checked += 1
    assert checked >= 20


def test_a_duration_of_exactly_n_frames_gives_n_frames_for_every_rate() -> None:
    for fps in (23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94):
        for frames in range(1, 482, 8):
            assert frames_for_duration(frames / fps, fps) == frames


def test_a_duration_between_grid_points_is_rounded_up() -> None:
    assert frames_for_duration(1.0, 24.0) == 25
    assert frames_for_duration(26 / 24, 24.0) == 33
    assert frames_for_duration(0.001, 24.0) == 1


@pytest.mark.parametrize(("asked", "expected"), [(120, (113, 121)), (122, (121, 129)), (2, (1, 9)), (-5, (1, 9))])
def test_the_neighbours_of_a_frame_count_off_the_grid(asked: int, expected: tuple[int, int]) -> None:
    assert nearest_frame_counts(asked) == expected


def test_a_size_off_the_grid_is_rendered_larger_and_cropped_to_the_centre() -> None:
    shape = render_shape(PixelShape(121, 1080, 1920, 24.0), 64)
    assert (shape.rendered.height, shape.rendered.width) == (1088, 1920)
    assert (shape.crop_top_px, shape.crop_left_px) == (4, 0)
    assert next_on_grid(64, 64) == 64


def test_a_shape_off_the_grid_has_no_latents() -> None:
    with pytest.raises(ValueError, match="num_frames must be 8k\\+1, got 24"):
        latent_shape(PixelShape(24, 64, 64, 24.0))
    with pytest.raises(ValueError, match="width must be a multiple of 32, got 65"):
        latent_shape(PixelShape(25, 64, 65, 24.0))
