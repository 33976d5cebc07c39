"""Contestants of a gang that do what they should not. Imported by its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.bench.gang_entrants import Entrant, entrants
from pipeline.bench.tiers import Built, Case, Contestant, Step, Velocities, Weights
from pipeline.parallel.layout import RankGroups

Faulty = Callable[[Step], Velocities]


def with_faults(groups: RankGroups, config: Mapping[str, Any]) -> dict[str, Entrant]:
    """Those that there are, and: one that all ranks fail to build, one that is off, one that a rank alone fails at, one
    that ends a rank."""
    known = entrants(groups, config)
    is_second = groups.world.index == 1

    def build(weights: Weights) -> Built:
        raise ImportError("no such library\nhere")

    def off(step: Step) -> Velocities:
        video, audio = step()
        assert video is not None
        return 1.2 * video, audio

    def raises(step: Step) -> Velocities:
        if is_second:
            raise MemoryError("no room here")
        return step()

    def dies(step: Step) -> Velocities:
        if is_second:
            os._exit(7)
        return step()

    exact = known["exact"]
    made = {name: _like(exact, name, fault) for name, fault in {"off": off, "raises": raises, "dies": dies}.items()}
    return known | made | {"missing": exact._replace(spread=Contestant("missing", False, build))}


def _like(exact: Entrant, name: str, fault: Faulty) -> Entrant:
    def build(weights: Weights) -> Built:
        built = exact.spread.build(weights)

        def bind(case: Case) -> Step:
            step = built.bind(case)
            return lambda: fault(step)

        return Built(built.module, bind)

    return exact._replace(spread=Contestant(name, False, build))
