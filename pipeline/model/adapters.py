"""Adapters (LoRA) in the weights of a denoiser: fused into clean weights, and taken out again to the bit.

Clean weights come from the checkpoint each time, since a second copy of them would not fit beside the first. Knows
nothing of which adapters a clip asks for.

Shape suffixes: N channels out, D channels in, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import CheckpointMismatch
from pipeline.model.checkpoint import (
    DENOISER_PREFIX,
    CheckpointFile,
    Sharding,
    TensorFile,
    denoiser_names,
    fill_place,
    region_of,
    set_tensor,
)
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.fitting import listed
from pipeline.model.fp8 import Fp8Linear
from pipeline.model.share import Region

_KEY = re.compile(r"diffusion_model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class Adapter(NamedTuple):
    """An adapter file in the published format, and how strongly it is to count."""

    path: Path
    strength: float


class FusedAdapters:
    """Which adapters are in a denoiser's weights, and the way to have others. One for each loaded denoiser.

    `dtype` and `sharding` are those which the denoiser was loaded with; every device of a sharding must change its
    weights at the same time. `num_fusions` counts how often the weights were changed.
    """

    def __init__(
        self,
        denoiser: AudioVideoDenoiser,
        checkpoint: CheckpointFile,
        dtype: torch.dtype | None,
        sharding: Sharding | None = None,
    ) -> None:
        self.num_fusions = 0
        self._denoiser = denoiser
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._sharding = sharding
        self._places = denoiser_names(denoiser.state_dict(), ())
        self._fused: tuple[Adapter, ...] | None = ()
        self._touched: set[str] = set()

    @torch.inference_mode()
    def use(self, adapters: Sequence[tuple[str | Path, float]]) -> None:
        """Have exactly these adapters (file, strength) in the weights; nothing happens if they are already.

        Weights are replaced by new tensors, one at a time. Before any of them is, raises UsageError for an absent file
        and CheckpointMismatch, listing every problem of a file, for one that is not an adapter of this denoiser.
        """
        wanted = tuple(Adapter(Path(path), float(strength)) for path, strength in adapters)
        if wanted == self._fused:
            return
        opened = self._opened(wanted)
        touched = {stored for adapter in opened for stored in adapter.factors}
        # Until all is done the weights are of no known set, and whatever was touched has to be written again.
        self._fused, self._touched = None, self._touched | touched
        regions = {
            stored: region_of(stored, self._places[stored], self._checkpoint, self._sharding)
            for stored in self._checkpoint.tensor_specs()
            if stored in self._touched
        }
        # The module is on one device.
        device = next(self._denoiser.parameters()).device
        with self._checkpoint.reading_ahead(regions, device):
            for stored, region in regions.items():
                self._write(stored, [adapter for adapter in opened if stored in adapter.factors], region, device)
        self._fused, self._touched = wanted, touched
        self.num_fusions += 1

    def check(self, adapters: Sequence[tuple[str | Path, float]]) -> None:
        """Raise what `use` would for these files, without a change to the weights. Reads their headers only."""
        self._opened(tuple(Adapter(Path(path), float(strength)) for path, strength in adapters))

    def _opened(self, adapters: tuple[Adapter, ...]) -> list[_AdapterFile]:
        specs = self._checkpoint.tensor_specs()
        shapes = {stored: specs[stored].shape for stored in self._places}
        return [_AdapterFile(adapter, shapes) for adapter in adapters]

    def _write(self, stored: str, adapters: list[_AdapterFile], region: Region, device: torch.device) -> None:
        place = self._places[stored]
        if not adapters:
            fill_place(self._denoiser, place, self._checkpoint, stored, device, self._dtype, region)
            return
        layer = self._denoiser.get_submodule(place.rpartition(".")[0])
        dtype = torch.float32 if isinstance(layer, Fp8Linear) else self._dtype
        clean_ND = self._checkpoint.read(stored, device, dtype, region)
        deltas = [adapter.delta(stored, device, region) for adapter in adapters]
        delta_ND = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(dim=0)
        set_tensor(self._denoiser, place, clean_ND + delta_ND)


class _AdapterFile:
    """An adapter's pairs of factors, each by the name on disk of the weight that it changes."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.strength = adapter.strength
        self._file = TensorFile(adapter.path, "adapter")
        pairs: dict[str, dict[str, str]] = {}
        problems = []
        for key in self._file.tensor_specs():
            match = _KEY.fullmatch(key)
            if match is None:
                problems.append(f"unknown: {key}")
            else:
                pairs.setdefault(f"{DENOISER_PREFIX}{match['module']}.weight", {})[match["factor"]] = key
        self.factors = pairs
        for stored in pairs:
            problems += self._problems_of(stored, shapes)
        if problems:
            raise CheckpointMismatch(
                listed(
                    f"{adapter.path}: an adapter must hold pairs of tensors diffusion_model.<module>.lora_A.weight and "
                    f"lora_B.weight that fit the weights of this model, got {len(problems)} that do not; use an "
                    "adapter made for it",
                    sorted(problems),
                )
            )

    def delta(self, stored: str, device: torch.device, region: Region) -> Tensor:
        """What is added to a weight, (N, D), or to a region of it.

        (B * strength) A in bfloat16, as LTX-2 release 1.2.0 rounds it.
        """
        pair = self.factors[stored]
        b_NR = self._file.read(pair["B"], device, torch.bfloat16, region[:1]) * self.strength
        return b_NR @ self._file.read(pair["A"], device, torch.bfloat16, (slice(None), *region[1:]))

    def _problems_of(self, stored: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        pair = self.factors[stored]
        if len(pair) < 2:
            return [f"without its other half: {key}" for key in pair.values()]
        if stored not in shapes:
            return [f"of no weight: {key}" for key in pair.values()]
        a, b = (self._file.tensor_specs()[pair[factor]].shape for factor in "AB")
        fits = len(a) == len(b) == 2 and b[1] == a[0] and (b[0], a[1]) == shapes[stored]
        return [] if fits else [f"wrong shape: {pair['B']} {list(b)} by {list(a)} must give {list(shapes[stored])}"]
