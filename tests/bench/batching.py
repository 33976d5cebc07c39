"""Seconds of a denoiser step a clip, for several small clips in one forward pass: python -m tests.bench.batching.

Says from which size on a batch pays on this device. `--tiny` shows on a CPU that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kernels.ops import fused_ops
from pipeline.bench.rows import append, new_row
from pipeline.bench.shapes import clips_named
from pipeline.bench.tiers import Weights
from pipeline.bench.timing import seconds_of
from pipeline.config.model import DenoiserSize, ModelConfig
from pipeline.engine.nano import CONFIG
from pipeline.engine.random_weights import best_device
from pipeline.geometry import latent_shape
from pipeline.model.streams import DistinctTimesteps, TokenStream

RESULTS = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parents[2] / "conf" / "published" / "ltx2_19b.json"
# The first stage of two-stage recipes has half the sides.
SHAPES = ["256x160x25", "512x320x25", "512x320x121", "768x512x121"]
BATCHES = (1, 2, 4, 8)
WARM_UPS, TIMED = 2, 5


def repeated(stream: TokenStream, batch: int) -> TokenStream:
    """The same clip `batch` times."""
    sigma_B = stream.sigma_B.repeat(batch)
    tokens_BTC, text_BSD = (tensor.repeat(batch, 1, 1) for tensor in (stream.tokens_BTC, stream.text_BSD))
    at = DistinctTimesteps.uniform(sigma_B)
    return replace(stream, tokens_BTC=tokens_BTC, text_BSD=text_BSD, sigma_B=sigma_B, timesteps=at)


@torch.inference_mode()
def measure(tiny: bool) -> dict[str, dict[int, float]]:
    """Median seconds of a step divided by the clips in it, by shape and clips."""
    device = best_device()
    config = CONFIG if tiny else json.loads(PUBLISHED.read_text())["checkpoint"]["config"]
    model = ModelConfig(size=DenoiserSize(2, 64, 32, 128) if tiny else DenoiserSize())
    weights = Weights(config["transformer"], model, device)
    denoiser = weights.denoiser(fused_ops(device))
    found: dict[str, dict[int, float]] = {}
    for label, clip in clips_named(["64x64x9"] if tiny else SHAPES, 24.0).items():
        case = weights.case(latent_shape(clip))
        found[label] = {}
        for batch in BATCHES:
            video, audio = repeated(case.video, batch), repeated(case.audio, batch)
            conditioning = denoiser.prepare(video, audio)
            call = lambda: denoiser(video, audio, conditioning)  # noqa: B023, E731 - called before the next one is made
            seconds = [seconds_of(call, device) for _ in range(WARM_UPS + TIMED)]
            found[label][batch] = statistics.median(seconds[WARM_UPS:]) / batch
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    row = new_row("batching", step_s_a_clip=measure(arguments.tiny))
    sys.stdout.write(json.dumps(row) + "\n")
    if not arguments.tiny:
        append(arguments.results, row)


if __name__ == "__main__":
    main()
