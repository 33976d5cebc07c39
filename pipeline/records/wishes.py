"""What a row wishes beyond a prompt and a shape: steering, adapters, a camera move, an enhanced prompt.

Pure values. A wish that recipe or model cannot honour is a problem of the row, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from pipeline.errors import PipelineError

# Columns of tasks that no recipe can do yet: part of the schema, refused in a row that fills them in.
TASK_COLUMNS = ("images", "audio", "video", "scenes")
# Columns that change numbers of a recipe, for those recipes that have them.
OVERRIDE_COLUMNS = ("num_steps", "cfg_scale", "stg_scale")
MAX_STEPS = 1000
MAX_ADAPTER_STRENGTH = 10.0


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A LoRA file to fuse: where it is, the sha256 of its bytes, and how strongly."""

    uri: str
    sha256: str
    strength: float


def _no_adapters(uri: str) -> str:
    raise PipelineError("this model takes no adapters")


@dataclass(frozen=True)
class ModelRules:
    """What the job's model can do for a row."""

    # Camera move -> URI of its adapter.
    cameras: Mapping[str, str] = field(default_factory=dict)
    can_enhance: bool = False
    has_audio: bool = True
    # sha256 of an adapter file that fits the model; a PipelineError says why it cannot be had or does not fit.
    adapter_sha256: Callable[[str], str] = _no_adapters


@dataclass(frozen=True, slots=True)
class Wishes:
    """The wishes of one row, resolved. None leaves a number to the recipe."""

    negative_prompt: str = ""
    num_steps: int | None = None
    cfg_scale: float | None = None
    stg_scale: float | None = None
    enhance_prompt: bool = False
    adapters: tuple[AdapterUse, ...] = ()

    def overrides(self) -> dict[str, Any]:
        """What of the recipe the row sets itself, as `pipeline.config.recipe.resolve` takes it."""
        return {
            "num_steps": self.num_steps,
            "cfg_scale": self.cfg_scale,
            "stg_scale": self.stg_scale,
            "negative_prompt": self.negative_prompt or None,
        }


PLAIN_MODEL = ModelRules()
NO_WISHES = Wishes()


def wishes_of(
    row: Mapping[str, Any],
    *,
    recipe: str,
    negative_prompt: str | None,
    honours: frozenset[str],
    refusal: Callable[[Mapping[str, Any]], str],
    model: ModelRules,
    problems: list[str],
) -> Wishes:
    """The wishes of `row`; what is wrong with them is added to `problems`.

    `negative_prompt` is the recipe's, None if it has no use for one; `honours` are the columns of OVERRIDE_COLUMNS that
    the recipe has numbers for, and `refusal` judges the row's values of them together.
    """
    refused = [name for name in TASK_COLUMNS if asks_for_something(row.get(name))]
    refused += [name for name in OVERRIDE_COLUMNS if row.get(name) is not None and name not in honours]
    if row.get("negative_prompt") and negative_prompt is None:
        refused.append("negative_prompt")
    problems.extend(
        f"{name} is not supported by recipe {recipe}, got {row[name]!r}; leave the column empty" for name in refused
    )
    enhance = row.get("enhance_prompt") is True
    if enhance and not model.can_enhance:
        problems.append("enhance_prompt must be false: the model's text encoder cannot write; leave the column empty")
    wishes = Wishes(
        negative_prompt=row.get("negative_prompt") or negative_prompt or "",
        num_steps=_steps_of(row, problems) if "num_steps" in honours else None,
        cfg_scale=_scale_of(row, "cfg_scale", problems) if "cfg_scale" in honours else None,
        stg_scale=_scale_of(row, "stg_scale", problems) if "stg_scale" in honours else None,
        enhance_prompt=enhance,
        adapters=_adapters_of(row, model, problems),
    )
    own_negative = None if negative_prompt is None else row.get("negative_prompt") or None
    if reason := refusal({**wishes.overrides(), "negative_prompt": own_negative}):
        problems.append(reason)
    return wishes


def _steps_of(row: Mapping[str, Any], problems: list[str]) -> int | None:
    value = row.get("num_steps")
    if value is None:
        return None
    if value % 1 != 0 or not 1 <= value <= MAX_STEPS:
        problems.append(f"num_steps must be a whole number from 1 to {MAX_STEPS}, got {value}; leave it to the recipe")
        return None
    return int(value)


def _scale_of(row: Mapping[str, Any], name: str, problems: list[str]) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if not (math.isfinite(value) and value >= 0):
        problems.append(f"{name} must be a finite number, 0 or more, got {value}; leave it to the recipe")
        return None
    return _unsigned_zero(value)


def _unsigned_zero(value: Any) -> float:
    """-0.0 as 0.0: they compare equal, so they must read the same in a content key too."""
    return float(value) + 0.0


def _adapters_of(row: Mapping[str, Any], model: ModelRules, problems: list[str]) -> tuple[AdapterUse, ...]:
    """The row's `loras` in order, then the adapter of its camera move."""
    uses = []
    for index, lora in enumerate(row.get("loras") or ()):
        uri = lora.get("uri") if isinstance(lora, Mapping) else None
        if not isinstance(uri, str) or not uri:
            problems.append(f"loras[{index}] must be a struct with a uri, got {lora!r}; give uri and strength")
            continue
        strength = lora.get("strength")
        if strength is None:
            strength = 1.0
        is_number = isinstance(strength, int | float | Decimal) and math.isfinite(strength)
        if not is_number or abs(strength) > MAX_ADAPTER_STRENGTH:
            problems.append(
                f"loras[{index}].strength must be between -{MAX_ADAPTER_STRENGTH:g} and {MAX_ADAPTER_STRENGTH:g}, "
                f"got {strength!r}; 1 is as trained"
            )
            continue
        uses += _adapter(f"loras[{index}].uri", uri, _unsigned_zero(strength), model, problems)
    if camera := row.get("camera"):
        if camera in model.cameras:
            uses += _adapter("camera", model.cameras[camera], 1.0, model, problems)
        else:
            names = ", ".join(sorted(model.cameras)) or "none with this model"
            problems.append(f"camera must be one of {names}, got {camera!r}; correct it or leave it empty")
    return tuple(uses)


def _adapter(what: str, uri: str, strength: float, model: ModelRules, problems: list[str]) -> list[AdapterUse]:
    try:
        return [AdapterUse(uri, model.adapter_sha256(uri), strength)]
    except PipelineError as error:
        problems.append(f"{what} must be an adapter that fits the model, got {uri!r}: {error}")
        return []


def asks_for_something(value: Any) -> bool:
    """False for null, false, an empty text or list, and a struct of nothing else."""
    if isinstance(value, Mapping):
        return any(asks_for_something(part) for part in value.values())
    return value is not None and value is not False and value not in ("", [])
