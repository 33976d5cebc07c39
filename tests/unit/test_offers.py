"""Which layouts a clip may get, and where it fits."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import DenoiserSize
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.cost.pricing import UnitPrice
from pipeline.planning.estimate import Estimator
from pipeline.planning.offers import Menu, layouts_up_to
from pipeline.planning.spread import Machine
from pipeline.records.work import Offer
from tests.unit.makers import parse

FULL = DenoiserSize()
ESTIMATOR = Estimator(FULL, Machine(600.0, 249.0), UnitPrice("p", Decimal(1)))
PLAIN = RecipeConfig("one", stages=[StageConfig(sigmas=[1.0, 0.0])])
LARGE = replace(parse(width=1920, height=1088, num_frames=121), grid_px=32)


def offers(recipe: RecipeConfig = PLAIN, card_gb: float | None = None, num_gpus: int = 8) -> dict[str, Offer]:
    menu = Menu(layouts_up_to(num_gpus, FULL), None if card_gb is None else card_gb * 1e9)
    return {offer.layout.name: offer for offer in menu.offers(LARGE, recipe, ESTIMATOR)}


def test_layouts_divide_the_heads_and_rings_are_for_what_heads_cannot_be_divided_by() -> None:
    names = {layout.name for layout in layouts_up_to(8, DenoiserSize(num_heads=4, num_audio_heads=4))}
    assert {"single", "ulysses2", "ulysses4", "tensor4", "ring2_ulysses4", "guidance2_ulysses4"} <= names
    assert not {"ulysses8", "ring2", "ring2_ulysses2"} & names
    assert all("ring" not in layout.name for layout in layouts_up_to(8, FULL))
    assert [layout.name for layout in layouts_up_to(1, FULL)] == ["single"]


def test_there_is_one_offer_for_each_number_of_gpus_and_weights_are_split_only_where_they_must() -> None:
    assert list(offers()) == ["single", "ulysses2", "ulysses4", "ulysses8"]
    assert not any(offer.misfit for offer in offers().values())
    assert offers(num_gpus=3).keys() == {"single", "ulysses2"}


def test_a_clip_that_does_not_fit_one_card_is_offered_the_layout_that_it_fits() -> None:
    """37 GB of weights and 2 GB of activations, beside what a process takes itself."""
    on_40, on_24 = offers(card_gb=41.5), offers(card_gb=24)
    assert on_40["single"].misfit.endswith("GB do not fit one card of 41.5 GB") and not on_40["ulysses2"].misfit
    assert list(on_24) == ["single", "tensor2", "ulysses2_tensor2", "ulysses4_tensor2"]
    assert on_24["single"].misfit and not on_24["tensor2"].misfit
    tiny = offers(card_gb=3)
    assert all(offer.misfit for offer in tiny.values())
    assert tiny["tensor8"].misfit.endswith("GB do not fit each of 8 cards of 3 GB")


def test_predictions_of_a_step_are_shared_where_there_are_several() -> None:
    guidance = [GuidanceConfig(video=StreamGuidance(cfg=3.0))]
    guided = RecipeConfig("guided", stages=[StageConfig(sigmas=[1.0, 0.0], guidance=guidance)])
    assert list(offers(guided)) == ["single", "guidance2", "guidance2_ulysses2", "guidance2_ulysses4"]


def test_one_layout_is_no_choice() -> None:
    (offer,) = Menu(layouts_up_to(2, FULL)[1:2]).offers(LARGE, PLAIN, ESTIMATOR)
    assert offer.layout.num_gpus == offer.estimate.num_gpus == 2
