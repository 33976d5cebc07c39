"""Which parts of a model stay on the device and which wait on the host, decided before anything is loaded.

Pure arithmetic: weights are counted from file headers, activations estimated from the largest clip. A part that waits
on the host is moved in for the phases that use it, which costs its bytes over the bus once a clip and phase and
changes no pixel. Moving is `residency.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipeline.errors import OutOfMemory
from pipeline.geometry import LatentShape, PixelShape

# What a CUDA context, its libraries' workspaces and the allocator's fragments take beside tensors.
RESERVED_BYTES = 2 << 30
# Activations in 16-bit numbers, from measurements on one H200 (torch 2.11, 121 frames): the LTX-2 denoiser's peak at
# 32,640 tokens is 1.95 GB above its weights; its video decoder takes 9.3 GB at 960x544 and 30.0 GB at 1920x1088.
DENOISE_BYTES_PER_TOKEN_AND_CHANNEL = 15
DECODE_BYTES_PER_PIXEL = 109
DECODE_BYTES_AT_LEAST = 1.4e9
# Hidden states of every layer of a 12 B encoder over 1,024 tokens, twice (stacked): under a gigabyte.
TEXT_BYTES = 1.0e9
PHASES = ("text_encode", "denoise", "upsample", "decode")


@dataclass(frozen=True)
class Part:
    """A part of the model: its weights, and the phases that need it on the device."""

    name: str
    weight_bytes: int
    phases: frozenset[str]


@dataclass(frozen=True)
class MemoryPlan:
    """Parts that wait on the host, and the peak expected of each phase."""

    on_host: frozenset[str]
    peak_bytes: Mapping[str, int]


def activations(
    rendered: PixelShape, shape: LatentShape, *, width: int, samples: int, element_bytes: int
) -> dict[str, int]:
    """Bytes that each phase takes beside weights, for the largest clip.

    `shape` and `samples` are of the largest denoiser call, `width` its video channels, `element_bytes` 2 or 4.
    """
    scale = element_bytes / 2
    tokens = samples * (shape.num_video_tokens + shape.num_audio_latents)
    pixels = rendered.num_frames * rendered.height * rendered.width
    return {
        "text_encode": round(TEXT_BYTES * scale),
        "denoise": round(DENOISE_BYTES_PER_TOKEN_AND_CHANNEL * tokens * width * scale),
        # An eighth of the decoder's work in space, at most.
        "upsample": round(DECODE_BYTES_PER_PIXEL * pixels / 64 * scale),
        "decode": round((DECODE_BYTES_AT_LEAST + DECODE_BYTES_PER_PIXEL * pixels) * scale),
    }


def plan_memory(parts: Sequence[Part], needed: Mapping[str, int], limit_bytes: int) -> MemoryPlan:
    """The plan that moves the fewest bytes a clip with every phase under `limit_bytes`.

    OutOfMemory if a phase does not fit even with every other part on the host.
    """
    fitting = []
    for count in range(len(parts) + 1):
        for waiting in combinations(parts, count):
            plan = _plan(parts, frozenset(part.name for part in waiting), needed)
            if max(plan.peak_bytes.values()) <= limit_bytes:
                moved = sum(part.weight_bytes * len(part.phases) for part in waiting)
                fitting.append((moved, sorted(plan.on_host), plan))
    if fitting:
        return min(fitting, key=lambda entry: entry[:2])[2]
    alone = _plan(parts, frozenset(part.name for part in parts), needed).peak_bytes
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
