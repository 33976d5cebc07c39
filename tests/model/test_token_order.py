"""The order of tokens: a permutation that makes blocks compact and changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.ops import BLOCK_TOKENS, reference_ops
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.streams import DistinctTimesteps
from pipeline.model.token_order import TokenOrder, tile_order

Golden = Callable[[str], Any]
SIZES = [(1, 1, 1), (1, 2, 3), (3, 5, 7), (15, 34, 60), (16, 17, 30), (2, 1, 200), (40, 1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_token_of_every_box_comes_once_and_boxes_one_after_the_other(size):
    count = size[0] * size[1] * size[2]
    order = tile_order([(1, 2, 2), size, (1, 2, 2)])
    assert sorted(order.source_T[4 : 4 + count].tolist()) == list(range(4, 4 + count))
    assert sorted(order.source_T.tolist()) == list(range(count + 8))
    assert torch.equal(order.source_T[order.back_T], torch.arange(count + 8))


@pytest.mark.parametrize("size", [(16, 34, 60), (15, 34, 60), (16, 17, 30), (13, 19, 29)], ids=str)
def test_a_block_is_a_small_box_where_raster_order_makes_it_two_thin_lines(size):
    """The mean squared distance of a block's tokens from their middle, in tiles of 4 frames, 6 rows and 6 columns."""
    grid = torch.meshgrid(*(torch.arange(count) for count in size), indexing="ij")
    places = torch.stack([axis.flatten() for axis in grid], dim=1) / torch.tensor((4, 6, 6))

    def spread(places):
        blocks = [block.var(dim=0, correction=0).sum() for block in places.split(BLOCK_TOKENS)]
        return torch.stack(blocks)

    tiled, raster = spread(places[tile_order([size]).source_T]), spread(places)
    # A tile's own is a quarter, a twelfth along each axis; a block may lie across two that touch.
    assert tiled.mean() < 0.5 and tiled.max() < 2 < raster.mean()


@pytest.mark.parametrize("folder", ["dit_ltx2_0", "dit_ltx2_3", "dit_ltxv_0_9_8_13b"])
def test_velocities_do_not_depend_on_the_order_but_for_rounding(folder, fixtures, golden: Golden):
    case = golden(f"{folder}/case_t2v")
    denoiser = load_denoiser(
        CheckpointFile(fixtures / folder / "model.safetensors"), reference_ops(), "cpu", torch.float32
    )
    num_tokens = case.video.tokens_BTC.shape[1]
    order = tile_order([(1, 1, num_tokens // 2), (1, 1, num_tokens - num_tokens // 2)], tile=(1, 1, 2))
    order = TokenOrder.from_source(order.source_T.flip(0))
    generator = torch.Generator().manual_seed(0)
    # Tokens held to different degrees, and that see each other to different degrees: all that belongs to a token moves.
    video = replace(
        case.video,
        timesteps=DistinctTimesteps(
            case.video.timesteps.values_BK[:, :1] * torch.tensor([[1.0, 0.5]]),
            torch.randint(2, case.video.tokens_BTC.shape[:2], generator=generator),
        ),
        attention_mask_BTT=torch.rand(1, num_tokens, num_tokens, generator=generator),
    )
    expected_video, expected_audio = denoiser(video, case.audio)
    got_video, got_audio = denoiser(order.apply(video), case.audio)
    torch.testing.assert_close(order.undo(got_video), expected_video, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got_video, expected_video, atol=1e-2), "the order was no order at all"
    if expected_audio is not None:
        torch.testing.assert_close(got_audio, expected_audio, rtol=1e-4, atol=1e-5)


def test_marks_of_keyframes_move_with_their_tokens(golden: Golden):
    video = golden("dit_ltx2_0/case_t2v").video
    num_tokens = video.tokens_BTC.shape[1]
    marks = torch.arange(num_tokens)[None]
    order = TokenOrder.from_source(torch.arange(num_tokens).flip(0))
    assert order.apply(replace(video, keyframes_mask_BT=marks)).keyframes_mask_BT.tolist() == [
        list(range(num_tokens))[::-1]
    ]
