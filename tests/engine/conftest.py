"""The nano model, built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ops import reference_ops
from pipeline.config.model import DenoiserSize, ModelConfig, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.engine.engine import RenderEngine
from pipeline.engine.loading import load_engine
from pipeline.engine.nano import CHECKPOINT, DISTILLED_ADAPTER, SPATIAL_UPSCALER, TEXT_ENCODER, build_nano
from pipeline.records.request import RenderRequest

STAGE_1_SIGMAS = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]
STAGE_2_SIGMAS = [0.909375, 0.725, 0.421875, 0.0]


@pytest.fixture(autouse=True)
def _one_thread_no_gradients():
    # Two threads on busy cores wait for each other far longer than they compute.
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "nano"
    build_nano(folder)
    return folder


@pytest.fixture
def nano_model(nano_folder: Path) -> ModelConfig:
    """The nano model's configuration; a test may change its own copy."""
    return ModelConfig(
        folder=str(nano_folder),
        checkpoint=CHECKPOINT,
        text_encoder=TEXT_ENCODER,
        spatial_upscaler=SPATIAL_UPSCALER,
        adapters={"distilled": DISTILLED_ADAPTER},
        size=DenoiserSize(
            num_layers=2, video_width=64, audio_width=32, text_tokens=128, num_heads=4, num_audio_heads=4
        ),
    )


@pytest.fixture
def load() -> Callable[..., RenderEngine]:
    def load_on_cpu(model: ModelConfig, **precision: Any) -> RenderEngine:
        return load_engine(
            model, PrecisionConfig(**({"torch_threads": 1} | precision)), device="cpu", ops=reference_ops()
        )

    return load_on_cpu


@pytest.fixture
def engine(nano_model: ModelConfig, load: Callable[..., RenderEngine]) -> RenderEngine:
    return load(nano_model)


@pytest.fixture
def recipe() -> RecipeConfig:
    return RecipeConfig(
        name="two_stage",
        stages=[
            StageConfig(size_factor=0.5, sigmas=STAGE_1_SIGMAS),
            StageConfig(upsample=2.0, sigmas=STAGE_2_SIGMAS),
        ],
    )


@pytest.fixture
def request_for() -> Callable[..., RenderRequest]:
    """A small request; name what matters to the test."""

    def build(**fields: Any) -> RenderRequest:
        defaults = {
            "id": "clip",
            "row_index": 0,
            "prompt": "a red fox walks through deep snow",
            "seed": 1,
            "width": 64,
            "height": 64,
            "num_frames": 9,
            "fps": 24.0,
            "recipe": "two_stage",
            "grid_px": 64,
        }
        return RenderRequest(**(defaults | fields))

    return build
