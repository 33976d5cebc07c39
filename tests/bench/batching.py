"""Seconds of a denoiser step a clip, for several small clips in one forward pass: python -m tests.bench.batching.

Says from which size on a batch pays on this device. `--tiny` shows on a CPU that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from kernels.ops import device_ops
from pipeline.engine.latents import audio_positions, video_positions
from pipeline.geometry import LatentShape
from pipeline.model.checkpoint import build_on_meta
from pipeline.model.hparams import DenoiserHparams
from pipeline.model.streams import DistinctTimesteps, TokenStream
from tests.bench.peers import TINY_SHAPES, Shape, inputs, randomise, transformer_section

RESULTS = Path(__file__).parent / "results" / "batching.jsonl"
# (latent frames, height, width, audio latents); the first stage of two-stage recipes has half the sides.
SHAPES: dict[str, Shape] = {
    "256x160x25": (4, 5, 8, 26),
    "512x320x25": (4, 10, 16, 26),
    "512x320x121": (16, 10, 16, 126),
    "768x512x121": (16, 16, 24, 126),
}
BATCHES = (1, 2, 4, 8)
WARM_UPS, TIMED = 2, 5


@torch.inference_mode()
def measure(tiny: bool) -> dict[str, dict[int, float]]:
    """Median seconds of a step divided by the clips in it, by shape and clips."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hparams = DenoiserHparams.from_config(transformer_section(tiny))
    denoiser = randomise(build_on_meta(hparams, device_ops(device)).to(torch.bfloat16), device)
    found: dict[str, dict[int, float]] = {}
    for label, shape in (TINY_SHAPES if tiny else SHAPES).items():
        found[label] = {}
        for batch in BATCHES:
            given = {name: value.repeat(batch, 1, 1) for name, value in inputs(shape, device).items()}
            sigma = torch.full((batch,), 0.9, device=device)
            at, latents = DistinctTimesteps.uniform(sigma), LatentShape(*shape, 24.0)
            video = TokenStream(given["video"], at, sigma, video_positions(latents, device=device), given["video_text"])
            audio = TokenStream(given["audio"], at, sigma, audio_positions(latents, device=device), given["audio_text"])
            conditioning = denoiser.prepare(video, audio)
            seconds = []
            for _ in range(WARM_UPS + TIMED):
                if device == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                denoiser(video, audio, conditioning)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            found[label][batch] = statistics.median(seconds[WARM_UPS:]) / batch
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    row = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "step_s_a_clip": measure(arguments.tiny),
    }
    sys.stdout.write(json.dumps(row) + "\n")
    if not arguments.tiny:
        with arguments.results.open("a") as results:
            results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
