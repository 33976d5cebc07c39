"""What the fast tier leaves out of steps: as configured, in the steps and layers it names, and nothing where it names none."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.ops import reference_ops
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.engine.conditions import HeldPicture, hold_to
from pipeline.engine.denoise import Scene, denoise
from pipeline.engine.engine import Brief, Picture
from pipeline.engine.latents import Tokens, add_noise, empty_tokens, seeded_noise
from pipeline.errors import UsageError
from pipeline.geometry import PixelShape, latent_shape
from pipeline.model.sparse_attention import SparseAttention

# 7x8x12 latents: 6 blocks, of which the first frame is one.
SHAPE = latent_shape(PixelShape(49, 256, 384, 24.0))
GUIDED = GuidanceConfig(
    video=StreamGuidance(cfg=3.0, stg=1.0, modality=3.0), audio=StreamGuidance(cfg=7.0), stg_blocks=[1]
)
SPARSE = {"attention": "block_sparse", "dense_first_layers": 0, "dense_last_layers": 0, "dense_below_tokens": 0}
STAGE = StageConfig(sigmas=[1.0, 0.75, 0.5, 0.25, 0.0])


def sampled(engine, stage=STAGE, hold_at=None):
    noise = seeded_noise(5)
    start = add_noise(empty_tokens(SHAPE, video_channels=128, audio_channels=128, device="cpu"), noise, 1.0)
    hold = None
    if hold_at is not None:
        start = Tokens(torch.cat((start.video_BTC, torch.randn(1, 96, 128)), dim=1), start.audio_BTC)
        hold = hold_to([HeldPicture(torch.ones(1, 128, 1, 8, 12), hold_at, 0.9)], start, SHAPE)
        start = replace(start, video_BTC=hold.blend(start.video_BTC))
    texts = engine._texts("a red fox", RecipeConfig(stages=[replace(stage, guidance=[GUIDED])]))
    return denoise(engine.denoiser, start, Scene(SHAPE, texts, hold), stage, noise, shortcuts=engine.shortcuts)
