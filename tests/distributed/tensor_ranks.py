"""What ranks do that hold a denoiser in shares: load it, call it, change its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels.ops import reference_ops
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import CheckpointFile, load_denoiser
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.fp8 import Fp8Linear
from pipeline.parallel import tensor
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.sequence import SequenceParallelDenoiser
from pipeline.parallel.tensor import TensorParallel
from tests.distributed.ranks import Call

Velocities = tuple[Tensor | None, Tensor | None]
Adapters = list[tuple[Path, float]]


class WatchedFile(CheckpointFile):
    """Notes how many bytes each reading gave."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read_bytes: dict[str, int] = {}

    def read_stored(self, name: str, *how: Any, **named: Any) -> Tensor:
        given = super().read_stored(name, *how, **named)
        self.read_bytes[name] = given.nbytes
        return given


@dataclass(frozen=True)
class Weights:
    """A model's file, and how it is to be held."""

    path: Path
    dtype: torch.dtype = torch.float32
    fp8_blocks: frozenset[int] = frozenset()

    def load(self, groups: RankGroups | None = None) -> tuple[AudioVideoDenoiser, FusedAdapters, WatchedFile]:
        """Whole, or this rank's share."""
        file = WatchedFile(self.path)
        sharding = None if groups is None else sharding_of(groups)
        denoiser = load_denoiser(
            file, reference_ops(), "cpu", self.dtype, fp8_blocks=self.fp8_blocks, sharding=sharding
        )
        return denoiser, FusedAdapters(denoiser, file, self.dtype, sharding), file


def sharding_of(groups: RankGroups) -> TensorParallel:
    group = groups.tensor.group
    assert group is not None, "the layout has a degree of tensor parallelism"
    return TensorParallel(group, group)


def held(denoiser: AudioVideoDenoiser) -> dict[str, Tensor]:
    """Every tensor by its name in code, scales of float8 weights among them, as it lies there."""
    scales = {
        f"{name}.weight_scale": layer.weight_scale
        for name, layer in denoiser.named_modules()
        if isinstance(layer, Fp8Linear) and layer.weight_scale is not None
    }
    return {name: value.clone() for name, value in (denoiser.state_dict() | scales).items()}


def bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As bytes: torch cannot send float8 numbers."""
    return {name: value.contiguous().view(torch.uint8) for name, value in tensors.items()}


def called(groups: RankGroups, calls: Mapping[str, Call], fp8_blocks: frozenset[int]) -> dict[str, Velocities]:
    """Of a denoiser in shares, its tokens spread too if the layout says so."""
    found = {}
    for name, call in calls.items():
        denoiser, _, _ = Weights(call.model, fp8_blocks=fp8_blocks).load(groups)
        if groups.layout.num_shards == 1:
            found[name] = call.velocities(denoiser)
        else:
            spread = SequenceParallelDenoiser(denoiser, groups, reference_ops().attention_with_lse)
            found[name] = call.velocities(spread)
    return found


def loaded_share(groups: RankGroups, weights: Weights) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The bits that the rank holds, and how many bytes it read of each tensor on disk."""
    denoiser, _, file = weights.load(groups)
    return bits(held(denoiser)), file.read_bytes


def with_adapters(
    groups: RankGroups, weights: Weights, adapters: Adapters, call: Call
) -> tuple[dict[str, Tensor], Velocities, bool]:
    """The bits held and the velocities with the adapters, and whether nothing is left of them once they are out."""
    denoiser, fused, _ = weights.load(groups)
    clean = bits(held(denoiser))
    fused.use(adapters)
    with_them, velocities = bits(held(denoiser)), call.velocities(denoiser)
    fused.use([])
    left = bits(held(denoiser))
    return with_them, velocities, all(torch.equal(left[name], clean[name]) for name in clean)


def reductions_of_a_call(groups: RankGroups, call: Call) -> int:
    """How many collectives one prepared call takes."""
    denoiser, _, _ = Weights(call.model).load(groups)
    prepared = denoiser.prepare(call.video, call.audio)
    with mock.patch.object(tensor, "all_reduce", wraps=tensor.all_reduce) as reduce:
        denoiser(call.video, call.audio, prepared)
    return reduce.call_count
