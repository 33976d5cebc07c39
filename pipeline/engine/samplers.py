"""Samplers: one step from a noisy state and the predicted clean one to the next state. Pure tensor functions.

A recipe names its sampler; the loop around the step is in `denoise.py`.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pipeline.engine.sigmas import NoiseStep
from pipeline.errors import UsageError

# (state, predicted clean state, step) -> next state; all (B,T,C) in float32.
Sampler = Callable[[Tensor, Tensor, NoiseStep], Tensor]


def euler(state_BTC: Tensor, clean_BTC: Tensor, step: NoiseStep) -> Tensor:
    """Straight along the velocity from the predicted clean state to this one."""
    velocity = (state_BTC - clean_BTC) / step.sigma
    return state_BTC + velocity * (step.next_sigma - step.sigma)


SAMPLERS: dict[str, Sampler] = {"euler": euler}


def sampler_named(name: str) -> Sampler:
    """The sampler a recipe asks for; UsageError lists the names there are."""
    if name not in SAMPLERS:
        raise UsageError(f"recipe.stages.sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name]
