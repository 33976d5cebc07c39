"""Whether the tensors of a file fit the places of a model: by name, shape and kind of number, all problems at once.

Works on what headers say, before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NUM_PROBLEMS_SHOWN = 20


class TensorSpec(NamedTuple):
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def differences(places: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], names: Mapping[str, str]) -> list[str]:
    """What keeps the tensors on disk (`specs`) from filling `places` (by name in code) by way of `names`.

    One line a problem, missing tensors first, then unexpected ones, then wrong kinds and shapes; empty if all fits.
    """
    sources = {place: stored for stored, place in names.items()}
    missing = [f"missing: {sources.get(place, place)}" for place in places if sources.get(place) not in specs]
    unexpected = [
        f"unexpected: {stored}"
        for stored, place in names.items()
        if stored in specs and (place not in places or sources[place] != stored)
    ]
    wrong = [
        line
        for stored, place in names.items()
        if stored in specs and place in places
        for line in _wrong(stored, places[place], specs)
    ]
    return sorted(missing) + sorted(unexpected) + sorted(wrong)


def _wrong(stored: str, place: Tensor, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    spec, scale = specs[stored], scale_of(stored, specs)
    if spec.shape != tuple(place.shape):
        yield f"wrong shape: {stored} must be {list(place.shape)}, got {list(spec.shape)}"
    if scale is not None and specs[scale] != TensorSpec((), torch.float32):
        yield f"wrong kind: {scale} must be one float32 number, got {specs[scale].dtype} {list(specs[scale].shape)}"
    elif spec.dtype.itemsize == 1 and spec.dtype.is_floating_point and scale is None:
        yield f"wrong kind: {stored} must come with {stored}_scale where it is float8 e4m3, got {spec.dtype} without"
    elif spec.dtype.is_floating_point != place.is_floating_point():
        yield f"wrong kind: {stored} must be like {place.dtype}, got {spec.dtype}"


def scale_of(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The name of the number that a float8 weight is to be multiplied with; None for any other tensor."""
    scale = f"{name}_scale"
    scaled = name.endswith(".weight") and name in specs and specs[name].dtype == torch.float8_e4m3fn
    return scale if scaled and scale in specs else None


def listed(headline: str, problems: list[str]) -> str:
    """A message of one line that says what should be, and below it the problems, cut where they are many."""
    shown = problems[:NUM_PROBLEMS_SHOWN]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n".join([headline, *(f"  {line}" for line in shown + more)])
