"""A manifest row as a request: parsed, every problem of the row listed at once, defaults filled in.

Pure values. Whether a recipe can honour a request is decided here too, from the facts in `RecipeRules`; where rows
come from and what is done already is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from pipeline.errors import InvalidRequest
from pipeline.geometry import (
    TEMPORAL_CELL_FRAMES,
    PixelShape,
    RenderShape,
    frames_for_duration,
    is_on_frame_grid,
    nearest_frame_counts,
    next_on_grid,
    num_audio_latents,
    render_shape,
)
from pipeline.records.wishes import NO_WISHES, PLAIN_MODEL, ModelRules, Wishes, wishes_of

INT64_RANGE = range(-(2**63), 2**63)
INT32_RANGE = range(-(2**31), 2**31)
MIN_FPS = 1.0
MAX_FPS = 240.0
USUAL_FPS = 24.0
# What a row says for itself. All its other columns together are judged once for all rows that say the same.
_OWN_COLUMNS = frozenset(("id", "prompt", "seed", "priority", "tags"))
# Rows may differ in a column of theirs each, such as a duration: forms are kept for so many, then anew.
MAX_FORMS = 50_000


@dataclass(frozen=True)
class RecipeRules:
    """What a recipe gives a row that says nothing, and what it can honour."""

    name: str
    width: int
    height: int
    num_frames: int
    fps: float
    grid_px: int
    crop: bool
    # The rendered size must have at least so many pixels a side.
    min_side_px: int = 2
    # Text to steer away from; None for a recipe without guidance.
    negative_prompt: str | None = None
    # Why it does not go with the job's model or settings; empty if it does.
    misfit: str = ""
    # Of wishes.OVERRIDE_COLUMNS, those that the recipe has numbers for.
    honours: frozenset[str] = frozenset()
    # Why it cannot be followed with the numbers and the negative prompt of a row (`Wishes.overrides`); empty if it can.
    refusal: Callable[[Mapping[str, Any]], str] = lambda overrides: ""


@dataclass(frozen=True)
class RequestLimits:
    """Upper bounds that keep one row from holding the farm."""

    max_side_px: int
    max_duration_s: float


@dataclass(frozen=True, slots=True)
class ClipForm:
    """What a request has in common with those that differ in id, prompt, seed, priority and tags only."""

    width: int
    height: int
    num_frames: int
    fps: float
    recipe: str
    grid_px: int
    wishes: Wishes = NO_WISHES


# Other columns of a row -> its form, for forms without a problem.
Forms = MutableMapping[Hashable, ClipForm]


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """One clip to render, every field resolved."""

    id: str
    row_index: int
    prompt: str
    seed: int
    width: int
    height: int
    num_frames: int
    fps: float
    recipe: str
    grid_px: int
    wishes: Wishes = NO_WISHES
    priority: int = 0
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    @property
    def form(self) -> ClipForm:
        return ClipForm(self.width, self.height, self.num_frames, self.fps, self.recipe, self.grid_px, self.wishes)

    @property
    def shape(self) -> RenderShape:
        return render_shape(PixelShape(self.num_frames, self.height, self.width, self.fps), self.grid_px)

    def pixel_content(self) -> dict[str, Any]:
        """What of the request changes pixels or sound, for the content key (README, "The contract").

        What the row changes of its recipe is in the recipe as resolved: to say what it says anyway is no change.
        """
        content = asdict(self)
        for name in ("id", "row_index", "priority", "tags", "recipe", "grid_px"):
            del content[name]
        for name in self.wishes.overrides():
            del content["wishes"][name]
        for adapter in content["wishes"]["adapters"]:
            del adapter["uri"]
        return content


def seed_from_id(row_id: str) -> int:
    """The seed of a row that gives none: the first 63 bits of the id's sha256, stable over runs and machines."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8]) >> 1


def parse_request(
    row: Mapping[str, Any],
    *,
    row_index: int,
    recipes: Mapping[str, RecipeRules],
    default_recipe: str,
    limits: RequestLimits,
    model: ModelRules = PLAIN_MODEL,
    forms: Forms | None = None,
) -> RenderRequest:
    """The request of a row whose columns have possible types (`storage.manifest` saw to that).

    `forms` are those of rows that were judged before under the same rules; this row's is added. Raises InvalidRequest
    with every problem of the row, each naming the rule, the value and a way out.
    """
    problems: list[str] = []
    row_id = row.get("id") or ""
    if not row_id.strip():
        problems.append("id must not be blank, got an empty one; name the row")
    prompt = row.get("prompt") or ""
    if not prompt.strip():
        problems.append("prompt must not be blank, got an empty one; describe the clip")
    known_as = _form_key(row)
    form = None if forms is None else forms.get(known_as)
    if form is None:
        rules = _rules_of(row, recipes, default_recipe, problems)
        width, height = (_side_of(row, name, rules, limits, problems) for name in ("width", "height"))
        num_frames, fps = _timing_of(row, rules, limits, problems, has_audio=model.has_audio)
    seed = _whole(row, "seed", INT64_RANGE, problems)
    priority = _whole(row, "priority", INT32_RANGE, problems)
    if form is None:
        wishes = _wishes_under(rules, row, model, problems)
        form = ClipForm(width, height, num_frames, fps, rules.name, rules.grid_px, wishes)
    if problems:
        raise InvalidRequest(tuple(problems))
    if forms is not None:
        if len(forms) >= MAX_FORMS:
            forms.clear()
        forms[known_as] = form
    return RenderRequest(
        id=row_id,
        row_index=row_index,
        prompt=prompt,
        seed=seed_from_id(row_id) if seed is None else seed,
        width=form.width,
        height=form.height,
        num_frames=form.num_frames,
        fps=form.fps,
        recipe=form.recipe,
        grid_px=form.grid_px,
        wishes=form.wishes,
        priority=priority or 0,
        tags=tag_pairs(row.get("tags")),
    )


def _form_key(row: Mapping[str, Any]) -> Hashable:
    """The row's columns but those of its own, as a key: equal ones make equal forms."""
    others = tuple([(name, value) for name, value in row.items() if value is not None and name not in _OWN_COLUMNS])
    try:
        hash(others)
    except TypeError:  # lists and structs
        return repr(others)
    return others


def _wishes_under(rules: RecipeRules, row: Mapping[str, Any], model: ModelRules, problems: list[str]) -> Wishes:
    return wishes_of(
        row,
        recipe=rules.name,
        negative_prompt=rules.negative_prompt,
        honours=rules.honours,
        refusal=rules.refusal,
        model=model,
        problems=problems,
    )


def tag_pairs(tags: Any) -> tuple[tuple[str, str], ...]:
    """Tags as sorted pairs. Parquet gives a map as a list of pairs, a struct as a dict; null values are left out."""
    items = tags.items() if isinstance(tags, Mapping) else tags or ()
    return _shared(tuple(sorted((str(name), str(value)) for name, value in items if value is not None)))


@lru_cache(maxsize=4096)
def _shared(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The same object for equal tags: neighbouring rows often have the same, at 200 bytes each."""
    return pairs


def _whole(row: Mapping[str, Any], name: str, bounds: range, problems: list[str]) -> int | None:
    """A whole number of the row, or None. A column of doubles or decimals is fine as long as its values are whole."""
    value = row.get(name)
    if value is None:
        return None
    # NaN is unequal to itself, and infinity leaves NaN behind: neither is whole.
    if isinstance(value, float | Decimal) and value % 1 != 0:
        problems.append(f"{name} must be a whole number, got {value}; leave it empty for the default")
        return None
    if int(value) not in bounds:
        problems.append(f"{name} must be between {bounds[0]} and {bounds[-1]}, got {value}; use a smaller number")
        return None
    return int(value)


def _positive(row: Mapping[str, Any], name: str, problems: list[str], way_out: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0):
        problems.append(f"{name} must be a finite number above 0, got {value}; {way_out}")
        return None
    return float(value)


def _rules_of(
    row: Mapping[str, Any], recipes: Mapping[str, RecipeRules], default: str, problems: list[str]
) -> RecipeRules:
    name = row.get("recipe") or default
    if name not in recipes:
        names = ", ".join(sorted(recipes))
        problems.append(f"recipe must be one of {names}, got {name!r}; correct it or leave it empty")
        return recipes[default]
    if recipes[name].misfit:
        suiting = ", ".join(sorted(other for other, rules in recipes.items() if not rules.misfit))
        problems.append(
            f"recipe must suit the job's model and settings, got {name!r}: {recipes[name].misfit}; use {suiting}"
        )
    return recipes[name]


def _side_of(row: Mapping[str, Any], name: str, rules: RecipeRules, limits: RequestLimits, problems: list[str]) -> int:
    default: int = getattr(rules, name)
    size = _whole(row, name, INT64_RANGE, problems)
    if size is None:
        size = default
    if size < 2 or size % 2:
        problems.append(f"{name} must be even and at least 2, got {size}; use {max(2, size + size % 2)}")
    elif size > limits.max_side_px:
        problems.append(f"{name} must be at most {limits.max_side_px}, got {size}; raise limits.max_side_px")
    elif next_on_grid(size, rules.grid_px) < rules.min_side_px:
        problems.append(
            f"{name} must be at least {rules.min_side_px} with recipe {rules.name}, got {size}; use {rules.min_side_px}"
        )
    elif not rules.crop and size % rules.grid_px:
        above = next_on_grid(size, rules.grid_px)
        use = f"{above - rules.grid_px} or {above}" if above > rules.grid_px else f"{above}"
        problems.append(f"{name} must be a multiple of {rules.grid_px} with recipe.crop=false, got {size}; use {use}")
    return size


def _timing_of(
    row: Mapping[str, Any], rules: RecipeRules, limits: RequestLimits, problems: list[str], *, has_audio: bool
) -> tuple[int, float]:
    """Frames and frames a second: `num_frames`, or the smallest count on the grid that lasts `duration_s`."""
    before = len(problems)
    fps = _positive(row, "fps", problems, f"use {rules.fps:g}")
    fps = rules.fps if fps is None else fps
    duration_s = _positive(row, "duration_s", problems, "give num_frames instead, or leave both empty")
    num_frames = _whole(row, "num_frames", INT64_RANGE, problems)
    if num_frames is not None and not is_on_frame_grid(num_frames):
        below, above = nearest_frame_counts(num_frames)
        use = f"{below} or {above}" if num_frames > 0 else f"{below}"
        problems.append(f"num_frames must be 8k+1, got {num_frames}; use {use}")
    if not MIN_FPS <= fps <= MAX_FPS:
        problems.append(f"fps must be between {MIN_FPS:g} and {MAX_FPS:g}, got {fps:g}; use {rules.fps:g}")
    if len(problems) > before:
        return rules.num_frames, rules.fps
    frames = num_frames or rules.num_frames
    if duration_s is not None:
        # Beyond the limit the exact count does not matter, and the largest doubles have none.
        frames = frames_for_duration(min(duration_s, 10 * limits.max_duration_s), fps)
        if num_frames is not None and num_frames != frames:
            problems.append(
                f"num_frames and duration_s must agree, got num_frames {num_frames} and {duration_s:g} s at "
                f"{fps:g} fps, which is {frames} frames; give one of them"
            )
    # A duration is rounded up to the frame grid: a clip may outlast the limit by a cell of frames at a usual rate.
    if frames / fps > limits.max_duration_s + TEMPORAL_CELL_FRAMES / USUAL_FPS:
        asked = f"{duration_s:g} s" if duration_s is not None else f"{frames} frames at {fps:g} fps"
        problems.append(
            f"a clip must last at most {limits.max_duration_s:g} s, got {asked}; raise limits.max_duration_s"
        )
        return rules.num_frames, fps
    if has_audio and num_audio_latents(frames, fps) < 1:
        problems.append(
            f"a clip must be long enough for one sound latent (0.02 s), got {frames} frames at {fps:g} fps; add frames"
        )
    return frames, fps
