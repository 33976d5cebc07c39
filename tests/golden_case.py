"""A golden case as values: what went into the reference, what came out, and how near a result must come to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """The tensors `in.*`, `mid.*` and `out.*` of one case, and what its file says about them."""

    tensors: dict[str, Tensor]
    params: dict[str, Any]
    tolerance: float  # largest error over largest expected value
    note: str

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def assert_close(self, name: str, actual: Tensor, *, bound: float | None = None) -> None:
        """Shape, and largest error over largest expected value: at most the case's tolerance, or a tighter `bound`."""
        allowed = self.tolerance if bound is None else bound
        assert allowed <= self.tolerance, f"bound {bound} is looser than the case's tolerance {self.tolerance}"
        expected = self.tensors[name]
        assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        expected = expected.double()
        error = float((actual.double() - expected).abs().max())
        scale = float(expected.abs().max())
        assert error <= allowed * scale, f"{name} is off by {error:.2e}, allowed {allowed:.0e} of its scale {scale:.2e}"


def read_case(path: Path) -> GoldenCase:
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    params = json.loads(metadata["params"])
    return GoldenCase(tensors, params, float(metadata["tolerance"]), metadata.get("note", ""))
