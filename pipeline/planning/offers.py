"""The layouts that a clip may get: which a model's heads allow, what the clip would take on each, and where it fits.

Pure. Which of them a clip does get is decided when it is handed out (`layout_choice`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.model import DenoiserSize
from pipeline.config.recipe import RecipeConfig
from pipeline.planning.estimate import Estimator
from pipeline.planning.memory import bytes_on_a_gpu
from pipeline.records.parallel import ONE_GPU, ParallelLayout
from pipeline.records.request import RenderRequest
from pipeline.records.work import Offer

# A step has up to four predictions, and few models have heads for more than eight GPUs.
DEGREES = (1, 2, 4, 8)
# What a process holds of a GPU beside tensors: its context, libraries, buffers of exchanges. Assumed.
RESERVED_BYTES = 2e9


def layouts_up_to(num_gpus: int, size: DenoiserSize) -> tuple[ParallelLayout, ...]:
    """Every layout of at most so many GPUs that divides the model's heads, the narrowest first.

    A ring passes more on than an exchange of heads moves, and each layout is a group of its own to load: rings are for
    what heads cannot be divided by.
    """
    common = math.gcd(*size.heads)
    layouts = (
        ParallelLayout(ulysses=ulysses, ring=ring, tensor=tensor, guidance=guidance)
        for ulysses, ring, tensor, guidance in itertools.product(DEGREES, repeat=4)
        if ulysses * ring * tensor * guidance <= num_gpus
        and common % (ulysses * tensor) == 0
        and (ring == 1 or common % (ulysses * tensor * ring))
    )
    return tuple(sorted(layouts, key=lambda layout: (layout.num_gpus, layout.name)))


@dataclass(frozen=True)
class Menu:
    """Layouts to choose from, for GPUs that hold `card_bytes`; None if that is not known. One layout is no choice."""

    layouts: tuple[ParallelLayout, ...] = (ONE_GPU,)
    card_bytes: float | None = None

    def offers(self, request: RenderRequest, recipe: RecipeConfig, estimator: Estimator) -> tuple[Offer, ...]:
        """For each number of GPUs the layout that the clip fits: of several those that split weights least, of these
        the fastest. If it fits none, the one that takes least memory."""
        if len(self.layouts) == 1:
            (layout,) = self.layouts
            return (Offer(layout, estimator.estimate(request, recipe, layout)),)
        size, precision = estimator.size, estimator.precision
        most_passes = recipe.max_passes(has_audio=size.has_audio)
        layouts = [layout for layout in self.layouts if layout.guidance <= most_passes]
        offers = []
        for _, alike in itertools.groupby(layouts, key=lambda layout: layout.num_gpus):
            needed = [
                (bytes_on_a_gpu(request, recipe, size, precision, layout) + RESERVED_BYTES, layout) for layout in alike
            ]
            offers.append(self._best(request, recipe, estimator, needed))
        return tuple(offers)

    def _best(
        self,
        request: RenderRequest,
        recipe: RecipeConfig,
        estimator: Estimator,
        needed: Sequence[tuple[float, ParallelLayout]],
    ) -> Offer:
        card_bytes = math.inf if self.card_bytes is None else self.card_bytes
        fitting = [layout for num_bytes, layout in needed if num_bytes <= card_bytes]
        if fitting:
            offers = [Offer(layout, estimator.estimate(request, recipe, layout)) for layout in fitting]
            return min(offers, key=lambda offer: (offer.layout.tensor, offer.estimate.clip_s))
        num_bytes, layout = min(needed, key=lambda each: each[0])
        on = "one card" if layout.num_gpus == 1 else f"each of {layout.num_gpus} cards"
        misfit = f"{num_bytes / 1e9:.1f} GB do not fit {on} of {card_bytes / 1e9:g} GB"
        return Offer(layout, estimator.estimate(request, recipe, layout), misfit)


# Without a choice: one GPU a clip.
NO_CHOICE = Menu()
