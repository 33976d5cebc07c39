"""Pictures become the bytes of a file: by the formula, by another's conversion, and back from a written file."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from kernels.reference_pictures import rgb_to_yuv420
from pipeline.media.mux import EncodeSettings, write_clip
from pipeline.records.frames import YuvFrames


def converted(video):
    planes, num_wrong = rgb_to_yuv420(video)
    assert num_wrong.item() == 0
    return YuvFrames(planes.numpy())


def smooth(num_frames, height, width, seed=0):
    """Colours in [-1,1] that differ little from one pixel to the next, (3,F,H,W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, num_frames, 4, 5, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (num_frames, height, width), mode="trilinear", align_corners=True)[0]


def of_8_bits(video):
    """The pictures that a byte for each colour can say, which is all that another's conversion takes."""
    levels = ((video * 0.5 + 0.5) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy(), levels.float() / 127.5 - 1


COLOURS = {
    (1, -1, -1): (63, 102, 240),
    (-1, 1, -1): (173, 42, 26),
    (-1, -1, 1): (32, 240, 118),
    (1, 1, 1): (235, 128, 128),
    (-1, -1, -1): (16, 128, 128),
    (5, 5, 5): (235, 128, 128),
    (0, 0, 0): (126, 128, 128),  # 125.5
}


@pytest.mark.parametrize("rgb", COLOURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_colour_has_its_levels_of_bt709(rgb, dtype):
    video = torch.tensor(rgb, dtype=dtype)[:, None, None, None].expand(3, 2, 4, 6)
    frames = converted(video)
    assert (frames.num_frames, frames.height, frames.width) == (2, 4, 6)
    assert [plane.shape for plane in (frames.y, frames.u, frames.v)] == [(2, 4, 6), (2, 2, 3), (2, 2, 3)]
    assert [set(plane.flat) for plane in (frames.y, frames.u, frames.v)] == [{level} for level in COLOURS[rgb]]


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 6, 10), (1, 66, 90)])
def test_every_sample_is_that_of_the_exact_formula(size):
    video = torch.randn(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float()
    frames = converted(video)
    red, green, blue = (video.double().numpy() / 2 + 0.5).clip(0, 1)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    u, v = 128 + 224 * (blue - luma) / (2 - 2 * 0.0722), 128 + 224 * (red - luma) / (2 - 2 * 0.2126)

    def on_even_columns_between_rows(plane):
        edged = np.pad(plane, ((0, 0), (0, 0), (1, 0)), mode="edge")
        across = edged[..., :-1:2] / 4 + edged[..., 1::2] / 2 + edged[..., 2::2] / 4
        return (across[:, 0::2] + across[:, 1::2]) / 2

    expected = (16 + 219 * luma, on_even_columns_between_rows(u), on_even_columns_between_rows(v))
    for found, exact in zip((frames.y, frames.u, frames.v), expected, strict=True):
        assert np.abs(found - exact).max() <= 0.5 + 1e-4


def rescaled(picture, scale):
    """A frame through another library's conversion; `scale` is what it is told."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=picture.width, height=picture.height, format=picture.format.name, time_base="1/24")
    scaler = graph.add("scale", f"{scale}:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp")
    kind = graph.add("format", "yuv420p" if "out_h_chr_pos" in scale else "rgb24")
    graph.link_nodes(source, scaler, kind, graph.add("buffersink")).configure()
    graph.push(picture)
    return graph.pull().to_ndarray()


def test_it_is_within_a_level_of_the_conversion_of_another_library():
    levels, video = of_8_bits(smooth(3, 64, 96))
    frames = converted(video)
    # Positions are in 256ths of a pixel: U and V on even columns, between two rows.
    scale = "out_color_matrix=bt709:out_range=tv:out_h_chr_pos=0:out_v_chr_pos=128"
    for index, picture in enumerate(levels):
        expected = YuvFrames(rescaled(av.VideoFrame.from_ndarray(picture, format="rgb24"), scale)[None])
        for ours, theirs in zip((frames.y, frames.u, frames.v), (expected.y, expected.u, expected.v), strict=True):
            assert np.abs(ours[index].astype(int) - theirs[0]).max() <= 1


def test_an_edge_on_an_even_column_shows_that_colours_are_sampled_there():
    """Blue from column 4 on: half of what the sample at column 4 sees, were it between columns 4 and 5 it were all."""
    video = torch.full((3, 1, 4, 12), -1.0)
    video[2, ..., 4:] = 1
    u = converted(video).u[0, 0].astype(int)
    assert list(u) == [128, 128, 212, 240, 240, 240]


def test_a_crop_is_converted_as_if_nothing_had_been_around_it():
    whole = torch.randn(3, 2, 12, 16, generator=torch.Generator().manual_seed(2))
    crop = whole[:, :, 3:11, 5:15]
    assert torch.equal(rgb_to_yuv420(crop)[0], rgb_to_yuv420(crop.contiguous())[0])


def test_a_written_clip_shows_the_pictures_it_was_made_of(tmp_path):
    levels, video = of_8_bits(smooth(9, 128, 192))
    settings = EncodeSettings(preset="veryfast", crf=18, x264_threads=1, audio_bitrate_kbps=128)
    path = tmp_path / "a.mp4"
    write_clip(path, iter([converted(video)]), None, fps=24.0, num_frames=9, sample_rate_hz=0, settings=settings)
    with av.open(str(path)) as container:
        # As a player does: by the file's own tags, and U and V where a file means them that does not say.
        shown = np.stack([rescaled(frame, "in_h_chr_pos=0:in_v_chr_pos=128") for frame in container.decode(video=0)])
    error = shown.astype(float) - levels
    assert 10 * np.log10(255**2 / (error**2).mean()) > 40
