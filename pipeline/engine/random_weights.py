"""Files of a published model's exact layout and size, filled with random numbers, for measuring without the weights.

Spreads of 1 / sqrt(fan-in) keep activations finite through any depth; nothing worth looking at comes out. Never zeros:
they multiply faster than numbers do. What a file holds is described in `conf/published/*.json`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
# Random fp8 values spread to this, a seventh of the largest; their scale takes it back.
_FP8_SPREAD = 64.0

# Name -> shape and the dtype's name in the safetensors format.
Layout = dict[str, tuple[tuple[int, ...], str]]


def layout_of(tensors: Mapping[str, list[str]]) -> Layout:
    """Every tensor of a description: shape such as `128x4096` -> names in which `{0-47}` stands for each number."""
    layout: Layout = {}
    for shape, patterns in tensors.items():
        sizes = tuple(int(size) for size in shape.split("x")) if shape else ()
        layout |= {name: (sizes, "BF16") for pattern in patterns for name in _expanded(pattern)}
    return layout


def quantised(layout: Layout, blocks: tuple[int, int]) -> Layout:
    """The layout with the linear layers of the denoiser's `blocks` (first, last) in 8 bits, scaled per tensor."""
    result: Layout = {}
    for name, (shape, dtype) in layout.items():
        match = re.fullmatch(r"model\.diffusion_model\.transformer_blocks\.(\d+)\..*\.weight", name)
        inside = match is not None and len(shape) == 2 and blocks[0] <= int(match[1]) <= blocks[1]
        result[name] = (shape, "F8_E4M3" if inside else dtype)
        if inside:
            result |= {name.removesuffix("weight") + scale: ((), "F32") for scale in ("weight_scale", "input_scale")}
    return result


def best_device() -> str:
    """A GPU if there is one: it draws 100 times faster."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_random(path: Path, layout: Layout, metadata: Mapping[str, str], *, device: str, seed: int) -> int:
    """Write a safetensors file tensor by tensor, drawn on `device`; it appears whole. Returns its size in bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    generator = torch.Generator(device).manual_seed(seed)
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, (shape, dtype) in layout.items():
                value = random_value(name, shape, dtype, layout, generator).contiguous()
                file.write(value.reshape(-1).view(torch.uint8).cpu().numpy().data)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return 8 + len(text) + end


def _expanded(pattern: str) -> Iterator[str]:
    pieces = re.split(r"\{(\d+)-(\d+)\}", pattern)
    ranges = [range(int(a), int(b) + 1) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    for numbers in itertools.product(*ranges):
        yield "".join(text + str(number) for text, number in zip(pieces[::3], [*numbers, ""], strict=True))


def random_value(name: str, shape: tuple[int, ...], dtype: str, layout: Layout, generator: torch.Generator) -> Tensor:
    """One tensor by its name on disk, drawn on the generator's device. `layout` is asked for the weight of a scale."""
    kind, device = _DTYPES[dtype], generator.device

    def draw(spread: float) -> Tensor:
        working = torch.float32 if dtype == "F8_E4M3" else kind
        return torch.randn(shape, generator=generator, device=device, dtype=working) * spread

    if name.endswith(".weight_scale"):
        weight_shape, _ = layout[name.removesuffix("_scale")]
        return torch.tensor(1 / (_FP8_SPREAD * math.sqrt(weight_shape[1])), dtype=kind)
    if name.endswith(".input_scale"):
        return torch.ones((), dtype=kind)
    if dtype == "F8_E4M3":
        return draw(_FP8_SPREAD).clamp_(-448, 448).to(kind)
    if re.search(r"norm\d?(\.weight)?$", name) and len(shape) == 1:
        # Gemma adds one to what is stored, all others store the factor itself.
        return torch.zeros(shape, dtype=kind) if _is_gemma(name) else torch.ones(shape, dtype=kind)
    if name.endswith("std-of-means"):
        return torch.ones(shape, dtype=kind)
    if name.endswith("timestep_scale_multiplier"):
        return torch.full(shape, 1000.0, dtype=kind)
    if name.endswith((".bias", "-of-means")) or len(shape) < 2:
        return draw(0.02)
    fan_in = shape[1] if "table" in name else math.prod(shape[1:])
    return draw(1 / math.sqrt(fan_in))


def _is_gemma(name: str) -> bool:
    return name.startswith(("language_model.", "multi_modal_projector.mm_soft"))
