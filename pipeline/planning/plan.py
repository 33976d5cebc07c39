"""What a run will do, decided before it starts: which rows are rendered, which are there already, which are left
out.

Pure: manifest rows and the look-up of what is committed come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.config.recipe import RecipeConfig, resolve, unsupported_overrides
from pipeline.config.tree import to_plain
from pipeline.errors import UsageError
from pipeline.planning.estimate import Estimator
from pipeline.planning.intake import Intake, Rejection, admit_rows
from pipeline.planning.offers import NO_CHOICE, Menu
from pipeline.records.request import MAX_FORMS, ClipForm, RecipeRules, RenderRequest, RequestLimits
from pipeline.records.wishes import OVERRIDE_COLUMNS, PLAIN_MODEL, ModelRules
from pipeline.records.work import NOT_HANDED_OUT, KeyStem, Offer, WorkItem, key_stem

# What a recipe gives a row is part of the resolved request already, and a thumbnail is neither pixels nor sound.
_NOT_CONTENT = ("name", "clip", "crop")


@dataclass(frozen=True)
class Selection:
    """Which rows of the manifest this run is for: only `ids` if given, and at most `limit` rendered ones."""

    ids: tuple[str, ...] | None = None
    limit: int | None = None


@dataclass
class Plan:
    """Every row of a manifest in one of five lists, each in row order but for `to_render` under a limit."""

    to_render: list[WorkItem] = field(default_factory=list)
    done: list[WorkItem] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    # Not part of this run: outside `ids`, or beyond `limit`.
    left_out: list[WorkItem] = field(default_factory=list)
    left_out_rejected: list[Rejection] = field(default_factory=list)
    # The commit records of `done`, by content key.
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Planner:
    """Turns rows into a plan under one configuration. `fingerprint` is the model's, or a stand-in for estimates."""

    recipes: Mapping[str, RecipeConfig]
    default_recipe: str
    precision: PrecisionConfig
    model: ModelConfig
    fingerprint: str
    limits: RequestLimits
    estimator: Estimator
    rules: ModelRules = PLAIN_MODEL
    # Why the model cannot follow a recipe, empty if it can; and the hashes of adapters that a recipe fuses by itself.
    misfit: Callable[[RecipeConfig], str] = lambda recipe: ""
    adapters_of: Callable[[RecipeConfig], Mapping[str, str]] = lambda recipe: {}
    # Why the job's settings do not go with recipes that are not among `recipes`.
    unusable: Mapping[str, str] = field(default_factory=dict)
    menu: Menu = NO_CHOICE
    # Offers and content but for prompt and seed, by form: a manifest of a million rows has a few.
    _kinds: dict[ClipForm, tuple[KeyStem, tuple[Offer, ...]]] = field(default_factory=dict, init=False, repr=False)

    def intake(self, rows: Iterable[Mapping[str, Any]]) -> Intake:
        rules = {name: recipe_rules(recipe, self.misfit(recipe)) for name, recipe in self.recipes.items()}
        stand_in = rules[self.default_recipe]
        rules |= {name: replace(stand_in, name=name, misfit=reason) for name, reason in self.unusable.items()}
        return admit_rows(rows, recipes=rules, default_recipe=self.default_recipe, limits=self.limits, model=self.rules)

    def item(self, request: RenderRequest) -> WorkItem:
        form = request.form
        kind = self._kinds.get(form)
        if kind is None:
            if len(self._kinds) >= MAX_FORMS:
                self._kinds.clear()
            kind = self._kinds[form] = self._kind(request)
        stem, offers = kind
        key = stem.key(request.prompt, request.seed)
        if len(self.menu.layouts) == 1:
            (offer,) = offers
            return WorkItem(request, key, offer.estimate, layout=offer.layout)
        # Until it is handed out.
        offer = next((offer for offer in offers if not offer.misfit), offers[-1])
        return WorkItem(request, key, offer.estimate, layout=offer.layout, layout_reason=NOT_HANDED_OUT, offers=offers)

    def _kind(self, request: RenderRequest) -> tuple[KeyStem, tuple[Offer, ...]]:
        recipe = resolved(self.recipes, request)
        stem = key_stem(
            request,
            recipe={**recipe_content(recipe), "adapters": dict(self.adapters_of(recipe))},
            precision=precision_content(self.precision),
            model=model_content(self.model, self.fingerprint),
        )
        return stem, self.menu.offers(request, recipe, self.estimator)

    def plan(
        self,
        intake: Intake,
        selection: Selection,
        committed: Callable[[Collection[str]], Mapping[str, Mapping[str, Any]]],
    ) -> Plan:
        """The plan for `intake`; `committed(keys)` gives the records of the keys that are done.

        Raises UsageError if `selection.ids` names a row that the manifest does not have.
        """
        wanted = self._wanted(intake, selection)
        items = [self.item(request) for request in intake.requests]
        records = committed({item.key for item in items if wanted(item.request.id)})
        plan = Plan(records=records)
        for item in items:
            if not wanted(item.request.id):
                plan.left_out.append(item)
            elif item.key in records:
                plan.done.append(item)
            else:
                plan.to_render.append(item)
        for rejection in intake.rejections:
            inside = wanted(rejection.row.get("id") or "")
            (plan.rejected if inside else plan.left_out_rejected).append(rejection)
        if selection.limit is not None:
            first = sorted(plan.to_render, key=lambda item: (-item.request.priority, item.request.row_index))
            plan.to_render, beyond = first[: selection.limit], first[selection.limit :]
            plan.left_out = sorted([*plan.left_out, *beyond], key=lambda item: item.request.row_index)
        return plan

    @staticmethod
    def _wanted(intake: Intake, selection: Selection) -> Callable[[str], bool]:
        if selection.ids is None:
            return lambda id: True
        known = {request.id for request in intake.requests}
        known |= {rejection.row.get("id") or "" for rejection in intake.rejections}
        unknown = [id for id in selection.ids if id not in known]
        if unknown:
            raise UsageError(f"ids must name rows of the manifest, got {', '.join(unknown)}; check the spelling")
        return set(selection.ids).__contains__


def resolved(recipes: Mapping[str, RecipeConfig], request: RenderRequest) -> RecipeConfig:
    """The recipe of a request with the numbers that its row sets itself."""
    return resolve(recipes[request.recipe], **request.wishes.overrides())


def recipe_rules(recipe: RecipeConfig, misfit: str = "") -> RecipeRules:
    clip = recipe.clip
    asked: dict[str, Any] = dict.fromkeys(OVERRIDE_COLUMNS, None)
    honours = {name for name in OVERRIDE_COLUMNS if not unsupported_overrides(recipe, **{**asked, name: 1})}
    return RecipeRules(
        name=recipe.name,
        width=clip.width,
        height=clip.height,
        num_frames=clip.num_frames,
        fps=clip.fps,
        grid_px=recipe.grid_px,
        crop=recipe.crop,
        min_side_px=recipe.min_side_px,
        negative_prompt=recipe.negative_prompt if recipe.has_guidance else None,
        misfit=misfit,
        honours=frozenset(honours),
        refusal=partial(_refusal, recipe),
    )


def _refusal(recipe: RecipeConfig, overrides: Mapping[str, Any]) -> str:
    """Why a row's numbers, each of which the recipe honours, do not go together or with it; empty if they do."""
    try:
        changed = resolve(recipe, **overrides)
    except UsageError as error:
        return f"the row's numbers cannot be honoured by recipe {recipe.name}: {error}"
    if overrides["negative_prompt"] is not None and not changed.has_guidance:
        rule = "negative_prompt must be empty where cfg_scale 1 leaves it without effect"
        return f"{rule}, got {overrides['negative_prompt']!r}; leave one of them empty"
    return ""


def recipe_content(recipe: RecipeConfig) -> dict[str, Any]:
    """The part of a resolved recipe that changes pixels or sound beyond what the request says already."""
    content: dict[str, Any] = to_plain(recipe)
    for name in _NOT_CONTENT:
        del content[name]
    del content["encode"]["thumbnail_quality"]
    if not recipe.has_guidance:
        del content["negative_prompt"]
    if all(stage.family != "ltx_video" for stage in recipe.stages):
        # Only decoders of LTX-Video take noise.
        del content["decode"]["timestep"], content["decode"]["noise_scale"]
    return content


def precision_content(precision: PrecisionConfig) -> dict[str, Any]:
    """The part of a precision that changes pixels or sound."""
    content = to_plain(precision)
    del content["name"]
    if precision.linear != "fp8":
        del content["keep_first_blocks"], content["keep_last_blocks"]
    if precision.attention != "block_sparse":
        for name in ("attention", "attention_density", "dense_below_tokens", "dense_above_level",
                     "dense_first_layers", "dense_last_layers"):  # fmt: skip
            del content[name]
    if not precision.step_cache_threshold:
        del content["step_cache_threshold"]
    return content


def model_content(model: ModelConfig, fingerprint: str) -> dict[str, Any]:
    """What of a model changes pixels or sound: its files, and the two settings that these do not say."""
    return {
        "fingerprint": fingerprint,
        "text_tokens": model.size.text_tokens,
        "exchange_timesteps": model.exchange_timesteps,
    }
