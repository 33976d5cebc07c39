"""Four processes over gloo for all tests of this folder, and models small enough for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.engine.nano import CHECKPOINT, build_nano
from pipeline.model.streams import DistinctTimesteps, TokenStream
from tests.distributed.ranks import Call, Ranks
from tests.golden import GoldenFolders
from tests.golden_case import read_case
from tests.model.conftest import DenoiserCase


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def gpu_ranks() -> Iterator[Ranks]:
    """As many as there are GPUs, up to four; see `require_gpus`."""
    ranks = Ranks(min(4, torch.cuda.device_count()), "cuda")
    yield ranks
    ranks.stop()


@pytest.fixture(autouse=True)
def _one_thread_no_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def model(fixtures: GoldenFolders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a golden folder's model, or of "nano"."""

    @cache
    def model(name: str) -> Path:
        if name != "nano":
            return fixtures / name / "model.safetensors"
        folder = tmp_path_factory.mktemp("nano")
        build_nano(folder)
        return folder / CHECKPOINT

    return model


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
