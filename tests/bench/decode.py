"""Seconds and peak memory of decoding a clip, frame by frame and whole: python -m tests.bench.decode.

Random weights of the published decoder; `--tiny` shows on a CPU that the script works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipeline.engine.components.video_vae import VideoDecoder, video_decoder_blueprint
from pipeline.engine.latents import ChannelStatistics
from tests.bench.peers import randomise

RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
CONFIG = Path(__file__).parent.parent.parent / "conf" / "published" / "ltx2_19b.json"
# (latent frames, height, width) of 1920x1088 and 768x512, 121 frames.
SHAPES = {"1920x1088x121": (16, 34, 60), "768x512x121": (16, 16, 24)}
TINY = {"64x64x9": (2, 2, 2)}


@torch.inference_mode()
def measure(tiny: bool) -> dict[str, dict[str, dict[str, float]]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads(CONFIG.read_text())["checkpoint"]["config"]
    module = randomise(video_decoder_blueprint(config["vae"]).module.to(torch.bfloat16), device)
    statistics = ChannelStatistics(128).to(device)
    decoder = VideoDecoder(module, statistics)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for label, shape in (TINY if tiny else SHAPES).items():
        latent = torch.randn(1, 128, *shape, device=device)

        def stream(latent: torch.Tensor = latent) -> None:
            for frame in decoder.stream(latent):
                ((frame.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).cpu()

        def whole(latent: torch.Tensor = latent) -> None:
            for frame in decoder.decode(latent).unbind(2):
                ((frame.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).cpu()

        found[label] = {}
        for name, run in (("stream", stream), ("whole", whole)):
            seconds = []
            for _ in range(3):
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            found[label][name] = {"first_s": seconds[0], "s": min(seconds), "peak_gb": round(peak / 1e9, 2)}
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
        "decode": measure(arguments.tiny),
    }
    sys.stdout.write(json.dumps(row) + "\n")
    if not arguments.tiny:
        with arguments.results.open("a") as results:
            results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
