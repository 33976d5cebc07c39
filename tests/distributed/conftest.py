"""Four processes over gloo for all tests of this folder, and models small enough for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.model.streams import DistinctTimesteps, TokenStream
from tests.distributed.ranks import Call, Ranks
from tests.golden import GoldenFolders
from tests.golden_case import read_case
from tests.model.conftest import DenoiserCase

# Largest error over largest value: what float32 sums in another order differ by, with room for ten steps.
BOUND = 1e-5
LAYOUTS = ("ulysses2", "ring2", "guidance2", "ring3", "guidance3", "ulysses4", "ring4", "guidance4", "ring2_ulysses2",
           "guidance2_ulysses2", "guidance2_ring2")  # fmt: skip


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(autouse=True)
def _one_thread_no_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def model(fixtures: GoldenFolders) -> Callable[[str], Path]:
    return lambda folder: fixtures / folder / "model.safetensors"


@pytest.fixture(scope="session")
def call(fixtures: GoldenFolders, model: Callable[[str], Path]) -> Callable[..., Call]:
    """The recorded call of a name such as dit_ltx2_0/case_t2v, or of its first `num_tokens` video tokens only."""

    @cache
    def call(name: str, num_tokens: int | None = None) -> Call:
        case = DenoiserCase(**vars(read_case(fixtures / f"{name}.safetensors")))
        video = case.video
        if video is not None and num_tokens is not None:
            video = first_tokens(video, num_tokens)
        return Call(model(name.split("/")[0]), video, case.audio, case.perturbations)

    return call


def first_tokens(video: TokenStream, num: int) -> TokenStream:
    index_BT, mask_BTT, marks_BT = video.timesteps.index_BT, video.attention_mask_BTT, video.keyframes_mask_BT
    return replace(
        video,
        tokens_BTC=video.tokens_BTC[:, :num],
        timesteps=DistinctTimesteps(video.timesteps.values_BK, None if index_BT is None else index_BT[:, :num]),
        positions_BAT2=video.positions_BAT2[:, :, :num],
        attention_mask_BTT=None if mask_BTT is None else mask_BTT[:, :num, :num],
        keyframes_mask_BT=None if marks_BT is None else marks_BT[:, :num],
    )


def assert_equal_up_to_rounding(got: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for mine, single in zip(got, expected, strict=True):
        assert (mine is None) == (single is None)
        if mine is not None and single is not None:
            assert mine.shape == single.shape
            error = float((mine - single).abs().max() / single.abs().max())
            assert error <= BOUND, f"off by {error:.1e} of the scale"
