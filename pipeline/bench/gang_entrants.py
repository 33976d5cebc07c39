"""Who takes part where a clip is spread over several devices: our tiers, the decoder, xDiT. To add one, add a line.

Ours are those of one device (`tiers.py`), called through what a worker's rank calls its denoiser through.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from kernels.ops import OpSet, fused_ops
from pipeline.bench.gang_decode import decoding
from pipeline.bench.tiers import PLAIN, TIERS, Built, Contestant, Weights, tier, tiers
from pipeline.errors import UsageError
from pipeline.model.denoiser import AudioVideoDenoiser, Denoiser
from pipeline.parallel.layout import RankGroups
from pipeline.parallel.sequence import SequenceParallelDenoiser
from pipeline.parallel.xfuser_usp import xfuser_usp
from pipeline.records.parallel import ParallelLayout

OURS = ("exact", "fp8", "fast", "decode")
# On the ranks of an Ulysses group on GPUs alone: our denoiser with xfuser's exchange, and xDiT's denoiser.
XFUSERS = ("exact_xfuser", "xdit", "xdit_compiled")
KNOWN = ("plain", *OURS, *XFUSERS)


class Entrant(NamedTuple):
    """A contestant on one rank: `spread` is collective, `alone` the same on one device, if that says anything.

    `judge` is the contestant whose result on one device is right.
    """

    spread: Contestant
    alone: Contestant | None
    judge: Contestant

    @property
    def is_step(self) -> bool:
        """If it computes the plain denoiser's velocities."""
        return self.judge is PLAIN


def default_for(layout: ParallelLayout) -> tuple[str, ...]:
    """Who takes part in a layout if nobody is named."""
    return OURS + XFUSERS * _is_ulysses(layout)


def entrants(groups: RankGroups, config: Mapping[str, Any]) -> dict[str, Entrant]:
    """All that are known, by name, on this rank. `config` is a file's metadata."""
    on_one = {contestant.name: contestant for contestant in TIERS}
    found = {made.name: Entrant(made, on_one[made.name], PLAIN) for made in tiers(partial(_spread, groups))}
    with_xfuser = tier("exact_xfuser", fused_ops, spread=partial(_spread_by_xfuser, groups))
    found[with_xfuser.name] = Entrant(with_xfuser, on_one["exact"], PLAIN)
    for name in ("xdit", "xdit_compiled"):
        build = partial(_build_xdit, groups.layout, compiled=name != "xdit")
        found[name] = Entrant(Contestant(name, False, build), None, PLAIN)
    whole = decoding(config["vae"], None)
    found[whole.name] = Entrant(decoding(config["vae"], groups.world), whole, whole)
    return found


def _spread(groups: RankGroups, denoiser: AudioVideoDenoiser, ops: OpSet) -> Denoiser:
    """As a worker's rank has it: heads were split with the weights, tokens are split here."""
    if groups.tokens.size == 1:
        return denoiser
    return SequenceParallelDenoiser(denoiser, groups, ops.attention_with_lse)


def _spread_by_xfuser(groups: RankGroups, denoiser: AudioVideoDenoiser, ops: OpSet) -> Denoiser:
    _require_ulysses("exact_xfuser", groups.layout, next(denoiser.parameters()).device.type)
    return SequenceParallelDenoiser(denoiser, groups, ops.attention_with_lse, xfuser_usp(groups.layout))


def _build_xdit(layout: ParallelLayout, weights: Weights, *, compiled: bool) -> Built:
    _require_ulysses("xDiT", layout, weights.device)
    from pipeline.bench.xdit import build

    return build(weights, layout, compiled=compiled)


def _require_ulysses(who: str, layout: ParallelLayout, device: str) -> None:
    if device != "cuda":
        raise UsageError(f"{who} must have GPUs, got {device}; xfuser cannot be imported without an accelerator")
    if not _is_ulysses(layout):
        raise UsageError(f"{who} is measured in layouts such as ulysses2, got {layout.name}")


def _is_ulysses(layout: ParallelLayout) -> bool:
    return layout == ParallelLayout(ulysses=layout.ulysses)
