"""Which parts of a model stay on the device and which wait on the host, decided before anything is loaded.

Pure arithmetic: weights are counted from file headers, activations come from the planner (`planning/memory.py`). A part
that waits on the host is moved in for the phases that use it, which costs its bytes over the bus once a clip and
phase and changes no pixel. Moving is `residency.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

from pipeline.errors import OutOfMemory

# What a CUDA context, its libraries' workspaces and the allocator's fragments take beside tensors.
RESERVED_BYTES = 2 << 30
PHASES = ("text_encode", "denoise", "upsample", "decode")


@dataclass(frozen=True)
class Part:
    """A part of the model: its weights, the phases that need it on the device, and if it can wait elsewhere."""

    name: str
    weight_bytes: int
    phases: frozenset[str]
    can_wait: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Parts that wait on the host, and the peak expected of each phase."""

    on_host: frozenset[str]
    peak_bytes: Mapping[str, int]


def plan_for_most(parts: Sequence[Part], demands: Sequence[Mapping[str, int]], limit_bytes: int) -> MemoryPlan:
    """The plan for as many of `demands` (largest first) as `limit_bytes` can hold at all; larger ones fail alone.

    OutOfMemory if not even the smallest fits.
    """
    needed: dict[str, int] = {}
    growing = []
    for demand in reversed(demands):
        needed = {phase: max(needed.get(phase, 0), demand[phase]) for phase in PHASES}
        growing.append(needed)
    for candidate in reversed(growing[1:]):
        with suppress(OutOfMemory):
            return plan_memory(parts, candidate, limit_bytes)
    return plan_memory(parts, growing[0], limit_bytes)


def plan_memory(parts: Sequence[Part], needed: Mapping[str, int], limit_bytes: int) -> MemoryPlan:
    """The plan that moves the fewest bytes a clip with every phase under `limit_bytes`.

    OutOfMemory if a phase does not fit even with every other part on the host.
    """
    fitting, movable = [], [part for part in parts if part.can_wait]
    for count in range(len(movable) + 1):
        for waiting in combinations(movable, count):
            plan = _plan(parts, frozenset(part.name for part in waiting), needed)
            if max(plan.peak_bytes.values()) <= limit_bytes:
                moved = sum(part.weight_bytes * len(part.phases) for part in waiting)
                fitting.append((moved, sorted(plan.on_host), plan))
    if fitting:
        return min(fitting, key=lambda entry: entry[:2])[2]
    alone = _plan(parts, frozenset(part.name for part in movable), needed).peak_bytes
    phase = max(alone, key=lambda name: alone[name])
    raise OutOfMemory(
        f"{phase} needs {alone[phase] / 1e9:.1f} GB of device memory with every other part on the host, got "
        f"{limit_bytes / 1e9:.1f} GB; render a smaller or shorter clip, or use a larger device"
    )


def _plan(parts: Sequence[Part], on_host: frozenset[str], needed: Mapping[str, int]) -> MemoryPlan:
    peaks = {
        phase: RESERVED_BYTES
        + needed[phase]
        + sum(part.weight_bytes for part in parts if part.name not in on_host or phase in part.phases)
        for phase in PHASES
    }
    return MemoryPlan(on_host, peaks)
