"""How one model is spread over GPUs, as a value: degrees, their product, their name, and what they must divide.

Knows no process and no tensor, so plans and settings use it too; groups of processes are made of it in `parallel`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError

# From the axis whose neighbours are farthest apart in rank to that whose neighbours are next to each other: tensor
# parallelism talks several times a layer, guidance parallelism once a step.
AXES = ("guidance", "ring", "ulysses", "tensor")
SINGLE = "single"
# Rows of a latent that each rank of a group has at least where they decode it together: the row beyond a picture's edge
# mirrors the second one, which must be the same rank's. Where there are fewer, each decodes the whole.
MIN_DECODE_ROWS = 2


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Degrees of parallelism; a rank is one GPU, and there are as many as the product of the degrees.

    `ulysses` exchanges heads for tokens, `ring` passes keys and values on; both split the video's tokens. `tensor`
    splits weights, `guidance` the predictions of a guided step. UsageError for a degree below 1.
    """

    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    guidance: int = 1

    def __post_init__(self) -> None:
        for axis, degree in zip(AXES, self.degrees, strict=True):
            if degree < 1:
                raise UsageError(f"parallel.{axis} must be 1 or more, got {degree}; 1 is not to split along it")

    @classmethod
    def named(cls, name: str) -> ParallelLayout:
        """The layout with this `name`. UsageError if there is none."""
        parts = [] if name == SINGLE else [re.fullmatch(r"([a-z]+)([1-9]\d*)", part) for part in name.split("_")]
        degrees = {part[1]: int(part[2]) for part in parts if part is not None and part[1] in AXES}
        layout = cls(**degrees)
        if layout.name != name:
            raise UsageError(
                f"a layout must be named {SINGLE} or by its degrees above 1 in the order {', '.join(AXES)}, "
                f"got {name}; use {layout.name} or such as ring2_ulysses2"
            )
        return layout

    @property
    def degrees(self) -> tuple[int, int, int, int]:
        """In the order of AXES."""
        return self.guidance, self.ring, self.ulysses, self.tensor

    @property
    def num_gpus(self) -> int:
        return math.prod(self.degrees)

    @property
    def num_shards(self) -> int:
        """Into how many parts the video's tokens are split."""
        return self.ring * self.ulysses

    @property
    def name(self) -> str:
        """Such as ulysses4, ring2_ulysses2, guidance2_tensor2; single if nothing is split."""
        return "_".join(f"{axis}{n}" for axis, n in zip(AXES, self.degrees, strict=True) if n > 1) or SINGLE

    def require_fits(self, num_heads: Sequence[int], gpus_per_node: int) -> None:
        """UsageError unless every stream's `num_heads` can be split so, on one node of `gpus_per_node` GPUs."""
        heads_split = self.ulysses * self.tensor
        common = math.gcd(*num_heads)
        if common % heads_split:
            allowed = [n for n in range(1, gpus_per_node + 1) if common % n == 0]
            raise UsageError(
                f"parallel.ulysses times parallel.tensor must divide the model's {common} heads, got {heads_split}; "
                f"use one of {allowed}"
            )
        if self.num_gpus > gpus_per_node:
            raise UsageError(
                f"a layout must fit one node, got {self.name} of {self.num_gpus} GPUs for nodes of {gpus_per_node}; "
                "use smaller degrees, and more workers for throughput"
            )


ONE_GPU = ParallelLayout()
