"""The noise levels of a stage as steps.

Where the levels come from (a list, a schedule) is in `pipeline/config/schedule.py`, what a step does with its two in
`samplers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class NoiseStep:
    """One step: from noise level `sigma` down to `next_sigma`, both in [0,1]."""

    sigma: float
    next_sigma: float


def noise_levels(sigmas: Sequence[float]) -> list[float]:
    """The levels as float32 holds them, which is what the reference computes with."""
    return torch.tensor(list(sigmas), dtype=torch.float32).tolist()


def noise_steps(sigmas: Sequence[float]) -> list[NoiseStep]:
    """A step for each neighbouring pair of levels."""
    return [NoiseStep(sigma, next_sigma) for sigma, next_sigma in pairwise(noise_levels(sigmas))]
