"""Seconds of a call on its device, of several in turns, the memory that one needs, and how far results are apart.

CUDA events on a GPU, which leave out what the host does meanwhile; the host's clock on a CPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], object]

# Contestants take turns so often, each time with one untimed call before the timed ones.
TURNS, TIMED_A_TURN = 3, 2


def seconds_of(call: Call, device: str) -> float:
    """Of one call, to the end of its work on the device."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def kernel_seconds_of(call: Call, device: str) -> float:
    """Of one short call on the device alone: its launch hides behind other work, which empties the caches too."""
    if device != "cpu":
        _filler(device).zero_()
    return seconds_of(call, device)


@cache
def _filler(device: str) -> Tensor:
    # Twenty times an H200's level 2 cache, and longer to write than Python takes to launch a kernel.
    return torch.empty(1_000_000_000, dtype=torch.uint8, device=device)


def least_s(call: Call, device: str, repeats: int = 20) -> float:
    """The least of many calls on the device alone, after three untimed ones: what it can do undisturbed."""
    for _ in range(3):
        call()
    return min(kernel_seconds_of(call, device) for _ in range(repeats))


def in_turns(
    calls: Mapping[str, Call], device: str, clock: Callable[[Call, str], float] = seconds_of, *, turns: int = TURNS
) -> dict[str, list[float]]:
    """Seconds of each call by name: A, B, A, B, ..., so that a machine that slows down slows all of them."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            call()
            found[name] += [clock(call, device) for _ in range(TIMED_A_TURN)]
    return found


def spread(all_s: Sequence[float]) -> dict[str, Any]:
    """Median, least and most, and the seconds they are of."""
    return {"median_s": statistics.median(all_s), "min_s": min(all_s), "max_s": max(all_s), "all_s": list(all_s)}


def added_bytes(call: Call, device: str) -> int | None:
    """The most memory that a call takes beside what was taken before it; not known on a CPU."""
    if device == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def num_bytes(module: nn.Module) -> int:
    """Of all tensors of a module; one that is there twice counts once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def difference(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative L2 error of the whole, and the cosine."""
    got, expected = got.double().flatten(), expected.double().flatten()
    error = (got - expected).norm() / expected.norm()
    return {"relative": error.item(), "cosine": nn.functional.cosine_similarity(got, expected, dim=0).item()}


def failure_of(error: Exception) -> dict[str, str]:
    """Why a contestant took no part, in one line."""
    first, *_ = str(error).splitlines() or [""]
    return {"failure": f"{type(error).__name__}: {first}"}


def forget(device: str) -> None:
    """Give back what a contestant that failed held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
