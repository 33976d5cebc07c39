"""Seconds of our denoiser's step by operations and precision, of each kernel alone, and of the step as one CUDA graph.

`python -m tests.bench.kernels [--parts ...] [--variants ...] [--peer]` takes a GPU and appends one row to
`tests/bench/results/kernels.jsonl`. Variants are named by precision and by how they compute: "plain" operations,
"fused" ones, or fused ones with the audio stream queued "beside" the video. They share weights and inputs, take turns,
and are timed by CUDA events; outputs are compared before times are. `--tiny` is for a machine without a GPU: it shows
that the script works.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import reference
from kernels.ops import OpSet, device_ops, fused_ops, reference_ops
from kernels.rows import Modulation, ScaledRows
from pipeline.engine.latents import audio_positions, video_positions
from pipeline.geometry import LatentShape
from pipeline.model.checkpoint import build_on_meta, set_tensor
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.fp8 import use_fp8
from pipeline.model.hparams import DenoiserHparams
from pipeline.model.streams import Conditioning, DistinctTimesteps, TokenStream
from tests.bench.peers import Bind, Shape, Step, inputs, randomise, their_step, transformer_section

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
SHAPES: dict[str, Shape] = {
    "768x512x121": (16, 16, 24, 126),
    "960x544x121": (16, 17, 30, 126),
    "1920x1088x121": (16, 34, 60, 126),
}
TINY_SHAPES: dict[str, Shape] = {"64x64x9": (2, 2, 2, 9)}
PARTS = ["attention", "kernels", "truth", "steps", "graphs", "profile"]
ROUNDS, STEPS_A_ROUND = 2, 2
KERNEL_TOKENS = (6144, 32640)
WIDTH, NUM_HEADS = 4096, 32
EPS = 1e-6
Call = Callable[[], object]


class Case(NamedTuple):
    """An operation at a size: its slot, its arguments, and the bytes that it cannot do without."""

    slot: str
    arguments: tuple
    num_bytes: int


def seconds_of(call: Call, device: str) -> float:
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


def median_s(call: Call, device: str, repeats: int = 20) -> float:
    for _ in range(3):
        call()
    return statistics.median(seconds_of(call, device) for _ in range(repeats if device == "cuda" else 1))


def difference(got: Tensor, expected: Tensor) -> dict[str, float]:
    got, expected = got.double().flatten(), expected.double().flatten()
    error = (got - expected).norm() / expected.norm()
    return {"relative": error.item(), "cosine": nn.functional.cosine_similarity(got, expected, dim=0).item()}


def ceilings(device: str, tiny: bool) -> dict[str, float]:
    """Copy bandwidth, and products of random numbers in bfloat16 and float8, the latter with either accumulation."""
    tokens, width = (64, 64) if tiny else (32640, WIDTH)
    found = {"copy_tb_per_s": _copy_tb_per_s(8 * tokens * width, device)}
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    for factor in (1, 4):
        weight = torch.randn(factor * width, width, device=device, dtype=torch.bfloat16) / 64
        bias = torch.randn(factor * width, device=device, dtype=torch.bfloat16)
        flops = 2 * tokens * width * factor * width
        plain_s = median_s(partial(nn.functional.linear, x, weight, bias), device)
        found[f"bf16_{factor}_tflops"] = flops / plain_s / 1e12
        if device == "cuda":
            for accumulation, (seconds, error) in _float8_product(x, weight, bias).items():
                found[f"fp8_{factor}_{accumulation}_tflops"] = flops / seconds / 1e12
                found[f"fp8_{factor}_{accumulation}_error"] = error
    return found


def _copy_tb_per_s(size: int, device: str) -> float:
    """Bytes read and written."""
    source = torch.randn(size, device=device, dtype=torch.bfloat16)
    return 2 * source.nbytes / median_s(partial(torch.empty_like(source).copy_, source), device) / 1e12


def _float8_product(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, tuple[float, float]]:
    """Seconds and error of the row-wise scaled product, with the sum of products in fewer bits and in all."""
    values, scale_a = reference.quantise_rows(x)
    quantised, scale_b = reference.quantise_rows(weight)
    wanted = reference.fp8_linear(ScaledRows(values[None], scale_a[None], x.dtype), quantised, scale_b, bias)
    found = {}
    for accumulation in ("fast", "exact"):
        product = partial(
            torch._scaled_mm, values, quantised.t(), scale_a=scale_a, scale_b=scale_b.t(), bias=bias,
            out_dtype=torch.bfloat16, use_fast_accum=accumulation == "fast",
        )  # fmt: skip
        found[accumulation] = (median_s(product, "cuda"), difference(product()[None], wanted)["relative"])
    return found


def cases(tokens: int, width: int, num_heads: int, device: str) -> Iterator[Case]:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    x, branch = draw(1, tokens, width), draw(1, tokens, width)
    rows = draw(1, 1, 6, width)
    shift, scale, gate = rows[:, :, :3].unbind(dim=2)
    modulation, unit = Modulation(scale, shift, None), x.nbytes
    angle = torch.randn(1, num_heads, tokens, width // num_heads // 2, device=device)
    rotary, weight = (angle.cos(), angle.sin()), draw(width)
    wide = draw(1, tokens, 4 * width)
    up, bias = draw(4 * width, width) / width**0.5, draw(4 * width)
    yield Case("rms_norm", (x, EPS), 2 * unit)
    yield Case("modulated_rms_norm", (x, scale, shift, None, EPS), 2 * unit)
    yield Case("modulated_rms_norm_quantised", (x, scale, shift, None, EPS), unit * 3 // 2)
    yield Case("gated_residual", (x, branch, gate, None), 3 * unit)
    yield Case("gated_residual_norm", (x, branch, gate, None, modulation, EPS), 4 * unit)
    yield Case("gated_residual_norm_quantised", (x, branch, gate, None, modulation, EPS), unit * 7 // 2)
    yield Case("qk_norm_rope", (x, weight, rotary, num_heads, EPS), 2 * unit + 2 * angle.nbytes)
    yield Case("qk_norm_rope_interleaved", (x, weight, rotary, num_heads, EPS), 2 * unit + 2 * angle.nbytes)
    yield Case("quantise_rows", (x,), unit * 3 // 2)
    yield Case("gelu_quantised", (wide,), 6 * unit)
    yield Case("linear_gelu", (x, up, bias), 5 * unit + up.nbytes)


def kernels_alone(device: str, tiny: bool, copy_tb_per_s: float) -> dict[str, dict]:
    """Of each operation by tokens: plain and fused seconds, what share of the copy bandwidth that is, and the error."""
    plain, fused, found = reference_ops(), fused_ops(device), {}
    for tokens in (16,) if tiny else KERNEL_TOKENS:
        for case in cases(tokens, 64 if tiny else WIDTH, 4 if tiny else NUM_HEADS, device):
            ours, theirs = getattr(fused, case.slot), getattr(plain, case.slot)
            fused_s = median_s(lambda f=ours, c=case: f(*c.arguments), device)
            got, wanted = (_first(f(*case.arguments)) for f in (ours, theirs))
            found[f"{case.slot} {tokens}"] = {
                "plain_ms": 1e3 * median_s(lambda f=theirs, c=case: f(*c.arguments), device, 5),
                "fused_ms": 1e3 * fused_s,
                "percent_of_copy": 100 * case.num_bytes / fused_s / 1e12 / copy_tb_per_s,
                **difference(got, wanted),
            }
    return found


def _first(output: object) -> Tensor:
    """The last tensor that an operation makes, float8 rows multiplied out."""
    if isinstance(output, Tensor):
        return output
    *_, last = output
    if isinstance(last, torch.dtype):
        return output.values_BTD.float() * output.scale_BT1
    if not isinstance(last, Tensor):
        return _first(last)
    values, last = output
    return values.float() * last if values.dtype == torch.float8_e4m3fn else last


def variants(device: str, tiny: bool) -> dict[str, AudioVideoDenoiser]:
    """Denoisers of the same random weights by operations and precision; those of one precision share their tensors."""
    hparams = DenoiserHparams.from_config(transformer_section(tiny))
    plain = randomise(build_on_meta(hparams, device_ops(device)).to(torch.bfloat16), device)
    # As in published files: the first block and the last five stay as they are.
    in_float8 = range(1) if tiny else range(1, hparams.num_layers - 5)
    found = {"exact plain": plain, "exact fused": copy_of(plain, fused_ops(device), range(0))}
    found["exact beside"] = copy_of(plain, fused_ops(device), range(0))
    found["fp8 plain"] = copy_of(plain, device_ops(device), in_float8)
    found["fp8 fused"] = copy_of(found["fp8 plain"], fused_ops(device), in_float8)
    found["fp8 beside"] = copy_of(found["fp8 plain"], fused_ops(device), in_float8)
    if device == "cuda":
        for name in ("exact beside", "fp8 beside"):
            found[name].overlap_audio(torch.cuda.Stream())
    return found


def copy_of(denoiser: AudioVideoDenoiser, ops: OpSet, fp8_blocks: range) -> AudioVideoDenoiser:
    copy = build_on_meta(denoiser.hparams, ops).to(torch.bfloat16)
    use_fp8(copy, fp8_blocks, ops)
    for name, tensor in denoiser.named_parameters():
        owner = denoiser.get_submodule(name.rpartition(".")[0])
        if tensor.dtype == torch.float8_e4m3fn:
            copy.get_submodule(name.rpartition(".")[0]).set_scaled_weight(tensor.data, owner.weight_scale)
        else:
            set_tensor(copy, name, tensor.data)
    return copy.eval()


def bind(denoiser: AudioVideoDenoiser, shape: Shape, device: str, *, keep_text: bool = True) -> Step:
    """One step at a shape; its text's keys and values are computed at each call unless they are kept."""
    given, latents = inputs(shape, device), LatentShape(*shape, 24.0)
    sigma = torch.full((1,), 0.9, device=device)
    at = DistinctTimesteps.uniform(sigma)
    video = TokenStream(given["video"], at, sigma, video_positions(latents, device=device), given["video_text"])
    audio = TokenStream(given["audio"], at, sigma, audio_positions(latents, device=device), given["audio_text"])
    conditioning = denoiser.prepare(video, audio)
    if not keep_text:
        streams = (conditioning.video, conditioning.audio)
        conditioning = Conditioning(*(replace(stream, text_keys_values=None) for stream in streams))
    return lambda: denoiser(video, audio, conditioning)


def steps(
    denoisers: dict[str, AudioVideoDenoiser], shapes: dict[str, Shape], device: str, peer: Bind | None
) -> dict[str, dict]:
    """Of each shape and variant: seconds of every timed step, and how far its velocities are from the first one's."""
    found: dict[str, dict] = {}
    for label, shape in shapes.items():
        calls: dict[str, Call] = {name: bind(denoiser, shape, device) for name, denoiser in denoisers.items()}
        outputs = {name: call() for name, call in calls.items()}
        if peer is not None:
            # Its weights are its own: that it computes the same is shown by tests/model/test_diffusers_parity.py.
            calls["diffusers compiled"] = peer(shape)
            calls["diffusers compiled"]()
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                call()
                times[name] += [seconds_of(call, device) for _ in range(STEPS_A_ROUND)]
        first = next(iter(outputs))
        for name in calls:
            found[f"{label} {name}"] = {"median_s": statistics.median(times[name]), "all_s": times[name]}
            for stream, got, wanted in zip(("video", "audio"), outputs.get(name, ()), outputs[first], strict=False):
                found[f"{label} {name}"][f"{stream} against {first}"] = difference(got, wanted)
        sys.stdout.write(f"{label}: { {name: round(statistics.median(t), 4) for name, t in times.items()} }\n")
        sys.stdout.flush()
    return found


def truth(denoisers: dict[str, AudioVideoDenoiser], shapes: dict[str, Shape], device: str) -> dict[str, dict]:
    """At the smallest shape, how far each variant is from the same weights computed in float32 throughout."""
    shape = next(iter(shapes.values()))
    source = denoisers["exact plain"]
    exact = build_on_meta(source.hparams, reference_ops())
    for name, tensor in source.named_parameters():
        set_tensor(exact, name, tensor.data.float())
    wanted = bind(exact, shape, device)()
    del exact
    found = {}
    for name, denoiser in denoisers.items():
        pairs = zip(("video", "audio"), bind(denoiser, shape, device)(), wanted, strict=True)
        found[name] = {stream: difference(got, best) for stream, got, best in pairs}
        sys.stdout.write(f"{name} from float32: {found[name]}\n")
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def attention_layouts(device: str, tiny: bool) -> dict[str, list[float]]:
    """Seconds of self-attention in turns, its inputs lying head by head or token by token."""
    tokens, width, num_heads = (16, 64, 4) if tiny else (32640, WIDTH, NUM_HEADS)
    by_token = [
        torch.randn(1, tokens, num_heads, width // num_heads, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    ]
    layouts = {"by token": by_token, "by head": [x.contiguous() for x in by_token]}
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, (q, k, v) in layouts.items():
            call = partial(reference.attention, q, k, v, None)
            found[name] += [seconds_of(call, device) for _ in range(8)]
    sys.stdout.write(f"attention: { {name: statistics.median(times) for name, times in found.items()} }\n")
    return found


def graphs(denoisers: dict[str, AudioVideoDenoiser], shapes: dict[str, Shape], device: str) -> dict[str, dict]:
    """The steps as one CUDA graph each, and on the host's clock how long their launches take one by one."""
    found: dict[str, dict] = {}
    for label, shape in shapes.items():
        for name, denoiser in denoisers.items():
            call = bind(denoiser, shape, device)
            eager = call()
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            launch_s = time.perf_counter() - started
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = call()
            graph.replay()
            torch.cuda.synchronize()
            found[f"{label} {name}"] = {
                "launch_s": launch_s,
                "eager_s": statistics.median(seconds_of(call, device) for _ in range(4)),
                "graph_s": statistics.median(seconds_of(graph.replay, device) for _ in range(4)),
                "equal": all(torch.equal(a, b) for a, b in zip(output, eager, strict=True)),
            }
    return found


def profile(denoisers: dict[str, AudioVideoDenoiser], shapes: dict[str, Shape], device: str) -> dict[str, list]:
    """Where a step's GPU time goes: kernels by name, milliseconds and calls, the largest first."""
    found = {}
    for label, shape in shapes.items():
        for name, denoiser in denoisers.items():
            call = bind(denoiser, shape, device)
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                call()
                torch.cuda.synchronize()
            events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
            found[f"{label} {name}"] = [
                [event.key[:120], round(event.self_device_time_total / 1e3, 3), event.count] for event in events[:25]
            ]
    return found


def new_row(device: str, tiny: bool) -> dict[str, object]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(0) if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "tiny": tiny,
    }


@contextmanager
def kept(row: dict[str, object], results: Path) -> Iterator[None]:
    """Append the row to the results, even if what fills it fails before its end. Toy sizes tell nothing of speed."""
    try:
        yield
    finally:
        if not row["tiny"] or results != RESULTS:
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--variants", nargs="*", help="time these only")
    parser.add_argument("--peer", action="store_true", help="time diffusers' denoiser, compiled, with ours")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = new_row(device, arguments.tiny)
    with kept(row, arguments.results):
        measure(row, arguments, device)


def measure(row: dict[str, object], arguments: argparse.Namespace, device: str) -> None:
    """Add to the row what each of the parts finds."""
    tiny, parts = arguments.tiny, arguments.parts
    shapes = TINY_SHAPES if tiny else SHAPES
    limits = ceilings(device, tiny)
    row["ceilings"] = limits
    sys.stdout.write(json.dumps(limits, indent=1) + "\n")
    if "attention" in parts:
        row["attention"] = attention_layouts(device, tiny)
    if "kernels" in parts:
        row["kernels"] = kernels_alone(device, tiny, limits["copy_tb_per_s"])
        for name, facts in row["kernels"].items():
            sys.stdout.write(f"{name}: {json.dumps({k: float(f'{v:.4g}') for k, v in facts.items()})}\n")
    if not {"truth", "steps", "graphs", "profile"} & set(parts):
        return
    denoisers = variants(device, tiny)
    if "truth" in parts:
        row["truth"] = truth(denoisers, shapes, device)
    chosen = {name: denoiser for name, denoiser in denoisers.items() if name in (arguments.variants or denoisers)}
    if "steps" in parts:
        peer = their_step(tiny, device, compiled=not tiny) if arguments.peer else None
        row["steps"] = steps(chosen, shapes, device, peer)
    if "graphs" in parts and device == "cuda":
        row["graphs"] = graphs(chosen, shapes, device)
    if "profile" in parts and device == "cuda":
        row["profile"] = profile(chosen, shapes, device)
    if device == "cuda":
        row["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
