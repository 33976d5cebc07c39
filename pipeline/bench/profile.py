"""What the device does in one step of each contestant: milliseconds of each kernel, those that take longest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.bench.rows import Row, new_row
from pipeline.bench.step import KNOWN
from pipeline.bench.tiers import Contestant, Step, Weights
from pipeline.bench.timing import failure_of, forget
from pipeline.config.model import ModelConfig
from pipeline.geometry import LatentShape

DEFAULT = tuple(KNOWN[name] for name in ("exact", "fp8", "fast"))
# Compilers and planners are done after the first.
_UNTIMED_STEPS = 2
# Of hundreds; what is left out is in the sum.
_MOST_KERNELS = 40


@torch.inference_mode()
def measure_profiles(
    section: Mapping[str, Any], model: ModelConfig, shapes: Mapping[str, LatentShape],
    contestants: Sequence[Contestant], device: str,
) -> Iterator[Row]:  # fmt: skip
    """A row for each shape. `section` is the `transformer` part of a file's metadata."""
    weights = Weights(section, model, device)
    for label, shape in shapes.items():
        case, found = weights.case(shape), dict[str, dict[str, Any]]()
        for contestant in contestants:
            try:
                found[contestant.name] = _profiled(contestant.build(weights).bind(case), device)
            except Exception as error:  # noqa: BLE001 - that one cannot take part is a result
                found[contestant.name] = failure_of(error)
            forget(device)
        yield new_row(
            "profile", model=model.name, shape=label, num_tokens=shape.num_video_tokens, device=device,
            contestants=found,
        )  # fmt: skip


def _profiled(step: Step, device: str) -> dict[str, Any]:
    """`kernels` as [name, calls, ms], and `sum_ms` of all: more than the step took where streams work side by side."""
    for _ in range(_UNTIMED_STEPS):
        step()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    # Nothing of the host beside a GPU: recording its calls would make the device wait for it.
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = recorded.key_averages()
    times_us = ((e.key, e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events)
    kernels = sorted(([name, calls, us / 1e3] for name, calls, us in times_us if us), key=lambda each: -each[2])
    return {"sum_ms": sum(ms for _, _, ms in kernels), "kernels": kernels[:_MOST_KERNELS]}
