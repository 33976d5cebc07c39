"""Manifest rows to requests or rejections: every row is judged before the first is rendered.

Pure: rows come in as plain dicts, verdicts go out in row order. Duplicate ids are decided here because one row alone
cannot show them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InvalidRequest
from pipeline.records.request import Forms, RecipeRules, RenderRequest, RequestLimits, parse_request
from pipeline.records.wishes import PLAIN_MODEL, ModelRules


@dataclass(frozen=True)
class Rejection:
    """A row that will not be rendered; `message` names every problem of the row."""

    row_index: int
    row: Mapping[str, Any]
    message: str


@dataclass
class Intake:
    """The verdict on a whole manifest, each list in row order."""

    requests: list[RenderRequest] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)


def admit_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    recipes: Mapping[str, RecipeRules],
    default_recipe: str,
    limits: RequestLimits,
    model: ModelRules = PLAIN_MODEL,
) -> Intake:
    """Judge every row. Nothing a row holds can stop the rows after it."""
    good: list[RenderRequest] = []
    bad: list[tuple[int, Mapping[str, Any], tuple[str, ...]]] = []
    first_row: dict[str, int] = {}
    twins: dict[str, list[int]] = {}
    forms: Forms = {}
    for row_index, row in enumerate(rows):
        row_id = row.get("id") or ""
        first = first_row.setdefault(row_id, row_index)
        if first != row_index and row_id.strip():
            twins.setdefault(row_id, [first]).append(row_index)
        try:
            good.append(
                parse_request(
                    row,
                    row_index=row_index,
                    recipes=recipes,
                    default_recipe=default_recipe,
                    limits=limits,
                    model=model,
                    forms=forms,
                )
            )
        except InvalidRequest as error:
            bad.append((row_index, row, error.problems))
    rejected = [_with_twins(row_index, row, problems, twins) for row_index, row, problems in bad]
    for request in good:
        if request.id in twins:
            rejected.append(_with_twins(request.row_index, _columns_of(request), (), twins))
    requests = [request for request in good if request.id not in twins] if twins else good
    return Intake(requests, sorted(rejected, key=lambda rejection: rejection.row_index))


def _with_twins(
    row_index: int, row: Mapping[str, Any], problems: tuple[str, ...], twins: Mapping[str, list[int]]
) -> Rejection:
    row_id = row.get("id") or ""
    if row_id in twins:
        others = [str(index) for index in twins[row_id] if index != row_index]
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        plural = "s" if len(others) > 1 else ""
        problems = (*problems, f"id must be unique, got {row_id!r} in row{plural} {shown} too; rename all but one")
    return Rejection(row_index, row, f'row {row_index} (id "{row_id}"): {"; ".join(problems)}')


def _columns_of(request: RenderRequest) -> dict[str, Any]:
    names = ("id", "prompt", "seed", "width", "height", "num_frames", "fps", "recipe")
    columns: dict[str, Any] = {name: getattr(request, name) for name in names}
    return {**columns, "tags": dict(request.tags)}
