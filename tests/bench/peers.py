"""Seconds of one denoiser step, ours against diffusers eager, on the same device with the same random inputs.

`python -m tests.bench.peers` runs each contestant in processes of its own, in turns (A B A B), and appends one row to
`tests/bench/results/peers.jsonl`. `--tiny` is for a machine without a GPU: it shows that the script works, its times
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

# (latent frames, height, width, audio latents).
Shape = tuple[int, int, int, int]
Step = Callable[[], tuple[Tensor, Tensor]]
Bind = Callable[[Shape], Step]

RESULTS = Path(__file__).parent / "results" / "peers.jsonl"
ROUNDS = 2
WARM_UPS, TIMED = 1, 3
# Stage 1 and stage 2 of 1920x1088, 121 frames at 24 fps.
SHAPES: dict[str, Shape] = {"960x544x121": (16, 17, 30, 126), "1920x1088x121": (16, 34, 60, 126)}
TINY_SHAPES: dict[str, Shape] = {"64x64x9": (2, 2, 2, 9)}
TEXT_TOKENS = 1024


def transformer_section(tiny: bool) -> dict:
    """The published `transformer` section of LTX-2.0 19B, or one of toy width."""
    heads, head_dim, audio_head_dim, layers = (2, 16, 8, 2) if tiny else (32, 128, 64, 48)
    return {
        "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
        "attention_head_dim": head_dim, "audio_attention_head_dim": audio_head_dim, "audio_in_channels": 128,
        "audio_cross_attention_dim": heads * audio_head_dim, "audio_num_attention_heads": heads,
        "audio_out_channels": 128, "audio_positional_embedding_max_pos": [20], "av_cross_ada_norm": True,
        "av_ca_timestep_scale_multiplier": 1000.0, "caption_channels": 3840, "cross_attention_dim": heads * head_dim,
        "frequencies_precision": "float64", "in_channels": 128, "norm_elementwise_affine": False, "norm_eps": 1e-6,
        "num_attention_heads": heads, "num_layers": layers, "out_channels": 128,
        "positional_embedding_max_pos": [20, 2048, 2048], "positional_embedding_theta": 10000.0,
        "positional_embedding_type": "rope", "qk_norm": "rms_norm", "rope_type": "split",
        "standardization_norm": "rms_norm", "timestep_scale_multiplier": 1000,
        "use_audio_video_cross_attention": True, "use_middle_indices_grid": True,
    }  # fmt: skip


def randomise(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """Real-size random weights, made on the device: zeros would be timed at another clock."""
    module = module.to_empty(device=device).eval().requires_grad_(False)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5 if tensor.dim() > 1 and "table" not in name else 0.02)
    return module


def inputs(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    frames, height, width, audio = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16, generator=generator)

    tokens = frames * height * width
    text = draw(1, TEXT_TOKENS, 3840)
    return {"video": draw(1, tokens, 128), "audio": draw(1, audio, 128), "video_text": text, "audio_text": text}


def our_step(tiny: bool, device: str) -> Bind:
    from kernels.ops import device_ops
    from pipeline.engine.latents import audio_positions, video_positions
    from pipeline.geometry import LatentShape
    from pipeline.model.checkpoint import build_on_meta
    from pipeline.model.hparams import DenoiserHparams
    from pipeline.model.streams import DistinctTimesteps, TokenStream

    hparams = DenoiserHparams.from_config(transformer_section(tiny))
    denoiser = randomise(build_on_meta(hparams, device_ops(device)).to(torch.bfloat16), device)

    def bind(shape: Shape) -> Step:
        given, latents = inputs(shape, device), LatentShape(*shape, 24.0)
        sigma = torch.full((1,), 0.9, device=device)
        at = DistinctTimesteps.uniform(sigma)
        video = TokenStream(given["video"], at, sigma, video_positions(latents, device=device), given["video_text"])
        audio = TokenStream(given["audio"], at, sigma, audio_positions(latents, device=device), given["audio_text"])
        conditioning = denoiser.prepare(video, audio)
        return lambda: denoiser(video, audio, conditioning)

    return bind


def their_step(tiny: bool, device: str, *, compiled: bool = False) -> Bind:
    from diffusers import LTX2VideoTransformer3DModel

    section = transformer_section(tiny)
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(
            num_attention_heads=section["num_attention_heads"],
            attention_head_dim=section["attention_head_dim"],
            cross_attention_dim=section["cross_attention_dim"],
            audio_num_attention_heads=section["audio_num_attention_heads"],
            audio_attention_head_dim=section["audio_attention_head_dim"],
            audio_cross_attention_dim=section["audio_cross_attention_dim"],
            num_layers=section["num_layers"],
            caption_channels=section["caption_channels"],
            rope_type="split",
        )
    model = randomise(model.to(torch.bfloat16), device)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def bind(shape: Shape) -> Step:
        given, (frames, height, width, audio) = inputs(shape, device), shape
        timestep = torch.full((1,), 900.0, device=device)
        return lambda: model(
            hidden_states=given["video"],
            audio_hidden_states=given["audio"],
            encoder_hidden_states=given["video_text"],
            audio_encoder_hidden_states=given["audio_text"],
            timestep=timestep.expand(1, frames * height * width),
            audio_timestep=timestep.expand(1, audio),
            sigma=timestep,
            num_frames=frames,
            height=height,
            width=width,
            fps=24.0,
            audio_num_frames=audio,
            return_dict=False,
        )

    return bind


CONTESTANTS = {"ours": our_step, "diffusers eager": their_step}


@torch.inference_mode()
def measure(name: str, tiny: bool) -> dict[str, list[float]]:
    """Seconds of each timed step, by shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = TINY_SHAPES if tiny else SHAPES
    bind = CONTESTANTS[name](tiny, device)
    seconds: dict[str, list[float]] = {}
    for label, shape in shapes.items():
        step = bind(shape)
        seconds[label] = []
        for index in range(WARM_UPS + TIMED):
            _finish(device)
            started = time.perf_counter()
            video, audio = step()
            _finish(device)
            if index >= WARM_UPS:
                seconds[label].append(time.perf_counter() - started)
        assert bool(torch.isfinite(video).all()) and bool(torch.isfinite(audio).all()), f"{name}: not finite"
    if device == "cuda":
        seconds["peak_gpu_memory_bytes"] = [torch.cuda.max_memory_allocated()]
    return seconds


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--contestant", choices=CONTESTANTS)
    arguments = parser.parse_args()
    if arguments.contestant:
        sys.stdout.write(json.dumps(measure(arguments.contestant, arguments.tiny)) + "\n")
        return
    found: dict[str, dict[str, list[float]]] = {name: {} for name in CONTESTANTS}
    for _ in range(ROUNDS):
        for name in CONTESTANTS:
            command = [sys.executable, "-m", "tests.bench.peers", "--contestant", name, *["--tiny"] * arguments.tiny]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for label, values in json.loads(done.stdout.splitlines()[-1]).items():
                found[name].setdefault(label, []).extend(values)
    row = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "tiny": arguments.tiny,
        "median_s": {name: {k: statistics.median(v) for k, v in by.items()} for name, by in found.items()},
        "all": found,
    }
    sys.stdout.write(json.dumps(row["median_s"], indent=1) + "\n")
    if not arguments.tiny:
        with RESULTS.open("a") as results:
            results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
