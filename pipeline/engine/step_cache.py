"""First-block cache: a step that begins as the last computed one did reuses what the other blocks did then.

What the first block adds to its input tells cheaply how much a step differs (ParaAttention's first-block cache). It
pays where neighbouring steps are near each other, so not with the few steps of distilled recipes.

Shape suffixes: B batch (the predictions of one call), T tokens, D channels of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.ops import OpSet
from pipeline.model.denoiser import OthersFn, StatePair
from pipeline.model.state import StreamState, settled


@dataclass(frozen=True, eq=False)
class _Computed:
    """What the last computed call added to each stream: in its first block, and in all after it."""

    by_first: list[Tensor]
    by_others: list[Tensor]


class StepCache:
    """The memory of one stage. Calls are told apart by their predictions, so each of these has its own residuals.

    The predictions of a call are computed together or not at all: the one that changed most decides.
    """

    def __init__(self, threshold: float, ops: OpSet) -> None:
        self._threshold = threshold
        self._ops = ops
        self._computed: dict[Hashable, _Computed] = {}
        self.num_calls = 0
        self.num_reused = 0

    def others_for(self, predictions: Hashable) -> OthersFn:
        """What a call of the denoiser with these predictions is given as `others`."""

        def others(before: StatePair, after_first: StatePair, run_others: Callable[[], StatePair]) -> StatePair:
            return self._after_last(predictions, before, after_first, run_others)

        return others

    def _after_last(
        self, predictions: Hashable, before: StatePair, after_first: StatePair, run_others: Callable[[], StatePair]
    ) -> StatePair:
        self.num_calls += 1
        begun = self._tokens(after_first)
        by_first = [x_BTD - start_BTD for x_BTD, start_BTD in zip(begun, self._tokens(before), strict=True)]
        last = self._computed.get(predictions)
        if last is not None and _relative_change(by_first, last.by_first) < self._threshold:
            self.num_reused += 1
            reused = iter([x_BTD + added_BTD for x_BTD, added_BTD in zip(begun, last.by_others, strict=True)])
            video, audio = (
                None if state is None else replace(state, x_BTD=next(reused), branch=None) for state in after_first
            )
            return video, audio
        ended = run_others()
        by_others = [x_BTD - start_BTD for x_BTD, start_BTD in zip(self._tokens(ended), begun, strict=True)]
        self._computed[predictions] = _Computed(by_first, by_others)
        return ended

    def _tokens(self, states: StatePair) -> list[Tensor]:
        return [self._settled(state) for state in states if state is not None]

    def _settled(self, state: StreamState) -> Tensor:
        return settled(state, self._ops).x_BTD


def _relative_change(now: list[Tensor], then: list[Tensor]) -> float:
    """mean|now - then| / mean|then|, of the sample and stream where it is largest. Waits for the device."""
    changes = [
        ((a_BTD - b_BTD).abs().float().mean(dim=(1, 2)) / b_BTD.abs().float().mean(dim=(1, 2)).clamp(min=1e-12)).max()
        for a_BTD, b_BTD in zip(now, then, strict=True)
    ]
    return max(change.item() for change in changes)
