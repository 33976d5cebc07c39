"""Seconds of one denoiser step: our tiers and our peers on the same weights, in turns, outputs compared before times.

A contestant that fails, or whose velocities are too far from the plain operations', is reported so and not timed.
`tflops` are effective, by the operations of a dense step; `executed_tflops`, the percentages and the floor are of those
that a contestant executes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.bench.ceilings import Ceilings, judged, measure_ceilings
from pipeline.bench.peers import PEERS
from pipeline.bench.rows import Row, new_row
from pipeline.bench.tiers import ABLATIONS, GRAPHED, PLAIN, TIERS, Built, Case, Contestant, Step, Velocities, Weights
from pipeline.bench.timing import TURNS, added_bytes, difference, failure_of, forget, in_turns, num_bytes, spread
from pipeline.config.model import ModelConfig
from pipeline.errors import UsageError
from pipeline.geometry import LatentShape
from pipeline.planning.estimate import denoiser_flops

DEFAULT = (*TIERS, *PEERS)
KNOWN = {contestant.name: contestant for contestant in (*DEFAULT, *GRAPHED, *ABLATIONS)}
_STREAMS = ("video", "audio")


@dataclass
class _Entry:
    """A contestant that takes part at a shape, and what is known of it so far."""

    contestant: Contestant
    step: Step
    attended: float
    facts: dict[str, Any]


def chosen(names: Sequence[str] | None) -> tuple[Contestant, ...]:
    """The contestants of these names; the tiers and the peers if none are given. UsageError for an unknown one."""
    unknown = sorted(set(names or ()) - KNOWN.keys())
    if unknown:
        raise UsageError(f"contestants must be of {', '.join(KNOWN)}, got {', '.join(unknown)}; see --help")
    return DEFAULT if names is None else tuple(KNOWN[name] for name in names)


@torch.inference_mode()
def measure_steps(
    section: Mapping[str, Any], model: ModelConfig, shapes: Mapping[str, LatentShape],
    contestants: Sequence[Contestant], device: str, turns: int = TURNS,
) -> Iterator[Row]:  # fmt: skip
    """A row for each shape, as soon as it is measured. `section` is the `transformer` part of a file's metadata."""
    weights = Weights(section, model, device)
    built: dict[str, Built] = {}
    failures: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        try:
            built[contestant.name] = contestant.build(weights)
        except Exception as error:  # noqa: BLE001 - that one cannot take part is a result
            failures[contestant.name] = failure_of(error)
    reference = PLAIN.build(weights)
    for label, shape in shapes.items():
        case = weights.case(shape)
        video = weights.hparams.video
        limits = measure_ceilings(shape.num_video_tokens, video.num_heads, video.head_dim, device)
        wanted = reference.bind(case)()
        entries, out = _entered([c for c in contestants if c.name in built], built, case, wanted, device)
        facts = _timed(entries, partial(denoiser_flops, model.size, shape), limits, device, turns) | out | failures
        flops = denoiser_flops(model.size, shape)
        order = [contestant.name for contestant in contestants]
        yield new_row(
            "step", model=model.name, shape=label, num_tokens=shape.num_video_tokens, device=device, tflop=flops / 1e12,
            ceilings=limits.as_facts(), contestants={name: facts[name] for name in order},
        )  # fmt: skip


def _entered(
    contestants: Sequence[Contestant], built: Mapping[str, Built], case: Case, wanted: Velocities, device: str
) -> tuple[list[_Entry], dict[str, dict[str, Any]]]:
    """Those whose step runs and computes what it should; and of the others, why not."""
    entries: list[_Entry] = []
    out: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        try:
            entry, velocities = _entry(contestant, built[contestant.name], case, device)
        except Exception as error:  # noqa: BLE001 - that one cannot take part is a result
            out[contestant.name] = failure_of(error)
            forget(device)
            continue
        entry.facts["difference"] = differences = _differences(velocities, wanted)
        problem = _not_comparable(differences, contestant.bound)
        if problem:
            out[contestant.name] = entry.facts | {"not_comparable": problem}
        else:
            entries.append(entry)
    return entries, out


def _entry(contestant: Contestant, built: Built, case: Case, device: str) -> tuple[_Entry, Velocities]:
    """A contestant bound to the case, the memory it needs there, and what it computes."""
    bound: list[Step] = []
    kept_bytes = added_bytes(lambda: bound.append(built.bind(case)), device)
    (step,) = bound
    velocities = step()
    step_bytes = added_bytes(step, device)
    facts = built.facts()
    if kept_bytes is not None and step_bytes is not None:
        # Of this contestant alone: others lie beside it and share its weights.
        facts["peak_gpu_memory_bytes"] = num_bytes(built.module) + kept_bytes + step_bytes
    return _Entry(contestant, step, built.attended(case), facts), velocities


def _timed(
    entries: Sequence[_Entry], flops_of: Callable[[float], float], limits: Ceilings, device: str, turns: int
) -> dict[str, dict[str, Any]]:
    """What each entry took, and what that is of the ceilings. `flops_of` counts a step by its part of attention."""
    times = in_turns({entry.contestant.name: entry.step for entry in entries}, device, turns=turns)
    found = {}
    for entry in entries:
        seconds = spread(times[entry.contestant.name])
        effective, executed = flops_of(1.0), flops_of(entry.attended)
        tflops, executed_tflops = (flops / seconds["median_s"] / 1e12 for flops in (effective, executed))
        floor_s = limits.floor_s(executed, in_float8=entry.contestant.in_float8)
        rates = {"tflops": tflops, "executed_tflops": executed_tflops, "floor_s": floor_s}
        found[entry.contestant.name] = (
            seconds | rates | limits.percentages(executed_tflops) | entry.facts | judged(seconds["median_s"], floor_s)
        )
    return found


def _differences(velocities: Velocities, wanted: Velocities) -> dict[str, dict[str, float]]:
    pairs = zip(_STREAMS, velocities, wanted, strict=True)
    return {name: difference(got, best) for name, got, best in pairs if got is not None and best is not None}


def _not_comparable(differences: Mapping[str, Mapping[str, float]], bound: float) -> str:
    worst = max(facts["relative"] for facts in differences.values())
    # A comparison with NaN is false.
    return "" if worst <= bound else f"velocities must be within {bound} of the plain operations', got {worst:.3g}"
