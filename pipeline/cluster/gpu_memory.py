"""How much memory of a GPU is in use, and by whom, as nvidia-smi says: so that a killed worker's is seen to be free.

Asked from beside the worker: a process that looks from inside holds memory itself.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

# What a driver keeps or gives back late differs by so much from one look to the next.
MARGIN_BYTES = 512 * 2**20
# nvidia-smi takes seconds on a node of 8 GPUs without persistence mode.
ANSWER_S = 20.0


@dataclass(frozen=True)
class GpuUse:
    """The memory in use of one GPU, whoever uses it."""

    uuid: str
    used_bytes: int


def memory_in_use(gpus: tuple[str, ...]) -> tuple[GpuUse, ...]:
    """Of `gpus`, each an index or UUID. Empty where there is no nvidia-smi, or it does not answer."""
    lines = _ask("-i", ",".join(gpus), "--query-gpu=uuid,memory.used")
    return tuple(GpuUse(uuid, int(mebibytes) * 2**20) for uuid, mebibytes in lines)


def smallest_gpu_bytes() -> int | None:
    """What each GPU of this machine holds at least; None where there is no nvidia-smi, or it does not answer."""
    sizes = [int(mebibytes) * 2**20 for (mebibytes,) in _ask("--query-gpu=memory.total")]
    return min(sizes, default=None)


def still_held(before: tuple[GpuUse, ...]) -> tuple[GpuUse, ...]:
    """Of the GPUs in `before` those that have more in use than then."""
    if not before:
        return ()
    now = {use.uuid: use.used_bytes for use in memory_in_use(tuple(use.uuid for use in before))}
    held = [GpuUse(use.uuid, now.get(use.uuid, 0) - use.used_bytes) for use in before]
    return tuple(use for use in held if use.used_bytes > MARGIN_BYTES)


def holders(uuid: str) -> tuple[int, ...]:
    """The processes that nvidia-smi sees on a GPU; from inside a container it may see none."""
    return tuple(int(pid) for of, pid in _ask("--query-compute-apps=gpu_uuid,pid") if of == uuid)


def _ask(*query: str) -> list[list[str]]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", *query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=ANSWER_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
