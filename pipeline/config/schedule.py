"""Noise levels from a few numbers: the schedules that a recipe may name, as pure functions.

Here rather than in the engine because the planner counts the same steps without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config.checks import require

# Token counts between which the shift grows, at a straight line and beyond them too.
SMALL_TOKENS, LARGE_TOKENS = 1024, 4096
# The beta schedule's table of levels: its length and its shift.
BETA_LEVELS, BETA_SHIFT, BETA_SHAPE = 10_000, 2.37, 0.6
BETA_INTEGRATION_STEPS = 2_000
# Noise that the linear half of a linear-quadratic schedule takes away.
LINEAR_NOISE = 0.025
# Logarithms of shifts are kept within this: beyond it e^x leaves float64, and long before it no step changes any more.
LARGEST_SHIFT = 600.0


@dataclass
class ScheduleConfig:
    """A schedule by name. All but `num_steps` have the values of the published LTX-2 pipelines."""

    name: str = "shifted"
    num_steps: int = 40
    # "shifted": the logarithm of the shift at 1,024 and at 4,096 tokens. Equal numbers shift by a constant, zeros not.
    base_shift: float = 0.95
    max_shift: float = 2.05
    # The last level above 0, to which the others are stretched; 0 leaves them as they are.
    terminal: float = 0.1
    # Tokens that the shift is for, whatever the clip's size; 0 takes the stage's own number.
    num_tokens: int = 4096
    # Steps left out at both ends. What follows the last one kept is 0.
    skip_first: int = 0
    skip_last: int = 0

    def __post_init__(self) -> None:
        at = "recipe.stages.schedule."
        names = ", ".join(SCHEDULES)
        require(self.name in SCHEDULES, at + "name", f"one of {names}", self.name, "use shifted")
        require(self.num_steps >= 1, at + "num_steps", "1 or more", self.num_steps, "use 40")
        for name in ("base_shift", "max_shift"):
            value = getattr(self, name)
            require(math.isfinite(value), at + name, "a finite number", value, "0.95 and 2.05 are the published ones")
        require(0 <= self.terminal < 1, at + "terminal", "from 0 to below 1", self.terminal, "use 0.1")
        require(self.num_tokens >= 0, at + "num_tokens", "0 or more", self.num_tokens, "0 takes the stage's own")
        for name in ("skip_first", "skip_last"):
            require(getattr(self, name) >= 0, at + name, "0 or more", getattr(self, name), "use 0 to skip none")
        skipped = self.skip_first + self.skip_last
        way_out = f"raise num_steps above {skipped}"
        require(skipped < self.num_steps, at + "skip_first and skip_last", "fewer than num_steps", skipped, way_out)

    def levels(self, num_tokens: int) -> list[float]:
        """Descending noise levels that end in 0, for a stage of `num_tokens` video tokens."""
        signals = SCHEDULES[self.name](self, self.num_tokens or num_tokens)
        if self.terminal and signals[-1] > 0:
            squeeze = (1 - self.terminal) / signals[-1]
            signals = [signal * squeeze for signal in signals]
        levels = [1 - signal for signal in signals]
        return [*levels[self.skip_first : len(levels) - self.skip_last], 0.0]


# Each gives signals, which are 1 - level and rise from 0. Those of very many tokens are far smaller than the last digit
# of a level near 1, so they are stretched before they become levels.


def _shifted(schedule: ScheduleConfig, num_tokens: int) -> list[float]:
    slope = (schedule.max_shift - schedule.base_shift) / (LARGE_TOKENS - SMALL_TOKENS)
    shift = schedule.base_shift + slope * (num_tokens - SMALL_TOKENS)
    factor = math.exp(max(-LARGEST_SHIFT, min(shift, LARGEST_SHIFT)))
    return [_shift(signal, factor) for signal in _uniform(schedule.num_steps)]


def _simple_diffusion(schedule: ScheduleConfig, num_tokens: int) -> list[float]:
    """Shifted by the number of tokens itself: arXiv 2301.11093, as LTX-Video has it."""
    return [_shift(signal, num_tokens / SMALL_TOKENS) for signal in _uniform(schedule.num_steps)]


def _linear_quadratic(schedule: ScheduleConfig, num_tokens: int) -> list[float]:
    """Half the steps straight down by `LINEAR_NOISE` in all, then a parabola of the same slope that ends at 0."""
    count = schedule.num_steps
    bend = count // 2
    slope = LINEAR_NOISE / bend if bend else 0.0
    curve = (1 - slope * count) / (count - bend) ** 2
    return [slope * i + curve * max(0, i - bend) ** 2 for i in range(count)]


def _beta(schedule: ScheduleConfig, num_tokens: int) -> list[float]:
    """Quantiles of the beta distribution (arXiv 2407.12173) in a table of shifted levels; equal ones occur once."""
    indices = (round(_beta_quantile(1 - signal) * (BETA_LEVELS - 1)) for signal in _uniform(schedule.num_steps))
    return [_shift(1 - (index + 1) / BETA_LEVELS, math.exp(BETA_SHIFT)) for index in dict.fromkeys(indices)]


SCHEDULES: dict[str, Callable[[ScheduleConfig, int], list[float]]] = {
    "shifted": _shifted,
    "simple_diffusion": _simple_diffusion,
    "linear_quadratic": _linear_quadratic,
    "beta": _beta,
}


def _uniform(num_steps: int) -> list[float]:
    return [i / num_steps for i in range(num_steps)]


def _shift(signal: float, factor: float) -> float:
    """A signal as its level has it when it is `factor` times weaker beside the same noise."""
    return signal / (signal + factor * (1 - signal))


def _beta_quantile(probability: float) -> float:
    """Where the symmetric beta distribution of `BETA_SHAPE` reaches `probability`.

    With u = x^shape the density is (1 - x)^(shape - 1) up to a factor, smooth below the middle, where it is summed by
    midpoints; the upper half mirrors the lower one.
    """
    if probability == 0.5:
        return 0.5  # exactly: the table has no middle entry, so the last bit decides which neighbour is taken
    if probability > 0.5:
        return 1 - _beta_quantile(1 - probability)
    step = 0.5**BETA_SHAPE / BETA_INTEGRATION_STEPS
    middles = (step * (i + 0.5) for i in range(BETA_INTEGRATION_STEPS))
    areas = [(1 - u ** (1 / BETA_SHAPE)) ** (BETA_SHAPE - 1) for u in middles]
    target, i = probability * 2 * sum(areas), 0
    while target > areas[i]:
        target, i = target - areas[i], i + 1
    return float((step * (i + target / areas[i])) ** (1 / BETA_SHAPE))
