"""Which numbers a checkpoint may be stored in, judged from its header alone. Knows names only as far as scales go."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from pipeline.errors import CheckpointMismatch
from pipeline.model.checkpoint import DENOISER_PREFIX, TensorSpec

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def require_usable_dtypes(path: Path, specs: dict[str, TensorSpec]) -> None:
    """CheckpointMismatch if a tensor is not of floating numbers, is float8 without its scale, or if the denoiser's
    matrices are of several dtypes, which no matrix product takes.
    """
    way_out = "use the published file of this model, not a converted one"
    for name, spec in specs.items():
        if not spec.dtype.is_floating_point:
            raise CheckpointMismatch(f"{path}: {name} must hold floating numbers, got {_named(spec.dtype)}; {way_out}")
        if spec.dtype in _FLOAT8 and f"{name}_scale" not in specs:
            rule = f"must come with {name.rpartition('.')[2]}_scale because it is {_named(spec.dtype)}"
            raise CheckpointMismatch(f"{path}: {name} {rule}, got none; {way_out}")
    matrices = {
        name: spec.dtype
        for name, spec in specs.items()
        if name.startswith(DENOISER_PREFIX) and name.endswith(".weight") and len(spec.shape) == 2
        if spec.dtype not in _FLOAT8
    }
    ranked = Counter(matrices.values()).most_common()
    if len(ranked) > 1:
        usual = ranked[0][0]
        odd = next(name for name, dtype in matrices.items() if dtype != usual)
        raise CheckpointMismatch(
            f"{path}: {odd} must be {_named(usual)} like the denoiser's other matrices, got {_named(matrices[odd])}; "
            f"{way_out}"
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
