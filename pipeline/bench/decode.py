"""Seconds and memory of decoding a clip's latent to bytes on the host, by each way there is. To add one, add a line.

Random weights of the published decoder. Pixels are compared with those of diffusers' whole decode before times are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.bench.ceilings import judged, measure_ceilings
from pipeline.bench.random_parts import random_video_decoder
from pipeline.bench.rows import Row, new_row
from pipeline.bench.tiers import SEED
from pipeline.bench.timing import added_bytes, failure_of, forget, in_turns, num_bytes, spread
from pipeline.config.model import ModelConfig
from pipeline.engine.components.streamed_decoder import FRAMES_PER_CONVOLUTION, Manner
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder
from pipeline.engine.decode import decode_frames
from pipeline.engine.tiling import tiles_of_size
from pipeline.errors import UsageError
from pipeline.geometry import PixelShape, RenderShape, latent_shape
from pipeline.model.hparams import DenoiserHparams
from pipeline.records.frames import YuvFrames

# What published recipes tell decoders that ask for it.
DECODE_TIMESTEP = 0.05
# Mean difference of bytes that other roundings to bfloat16 may make.
_BOUND_LEVELS = 1.0
_TILES = tiles_of_size(frames=(64, 24), height_px=(512, 64), width_px=(512, 64))
# What a convolution of a fused stream is given at once.
_FRAMES_PER_CONVOLUTION = (2, 4, 8, 16)
Decode = Callable[[VideoDecoder, Tensor, RenderShape, DecodeNoise | None], Iterator[YuvFrames]]


class Way(NamedTuple):
    """A way of decoding, how its weights lie and its stream works; `blends` if its pixels are others near seams."""

    name: str
    decode: Decode
    channels_last: bool = False
    frames_per_convolution: int = FRAMES_PER_CONVOLUTION
    fuses: bool = False
    blends: bool = False


def _as_worker(
    decoder: VideoDecoder, latent: Tensor, shape: RenderShape, noise: DecodeNoise | None
) -> Iterator[YuvFrames]:
    return decode_frames(decoder, latent, shape, noise=noise)


def _in_tiles(
    decoder: VideoDecoder, latent: Tensor, shape: RenderShape, noise: DecodeNoise | None
) -> Iterator[YuvFrames]:
    return decode_frames(decoder, latent, shape, tiles=_TILES, noise=noise)


def _whole(decoder: VideoDecoder, latent: Tensor, shape: RenderShape, noise: DecodeNoise | None) -> Iterator[YuvFrames]:
    """diffusers' decoder called once; its frames become bytes one by one, for which there is always room."""
    for frame_B3FHW in decoder.decode(latent, noise=noise).split(1, dim=2):
        planes_FRW, _ = decoder.ops.rgb_to_yuv420(frame_B3FHW[0])
        yield YuvFrames(planes_FRW.cpu().numpy())


def _decoders(decoder: VideoDecoder, ways: Sequence[Way]) -> dict[str, VideoDecoder]:
    """One for each way, all of the same weights, of which there are two copies."""
    module: Any = copy.deepcopy(decoder.module)
    module = module.to(memory_format=torch.channels_last_3d)
    prepared = {}
    for way in ways:
        other = prepared[way.name] = copy.copy(decoder)
        if way.channels_last:
            other.module = module
        other.manner = Manner(way.frames_per_convolution, decoder.ops if way.fuses else None)
    return prepared


WHOLE = Way("whole", _whole)
WAYS = (
    WHOLE,
    Way("whole_channels_last", _whole, channels_last=True),
    Way("tiled", _in_tiles, blends=True),
    Way("stream_1", _as_worker),
    # The kernels read channels that lie next to each other.
    *(Way(f"stream_{n}_channels_last_fused", _as_worker, True, n, fuses=True) for n in _FRAMES_PER_CONVOLUTION),
)


def ways_named(names: Sequence[str] | None) -> tuple[Way, ...]:
    """The ways of these names after the whole decode, which the others are compared with; all if none are given.

    UsageError for an unknown one.
    """
    known = [way.name for way in WAYS]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise UsageError(f"contestants must be of {', '.join(known)}, got {', '.join(unknown)}; see --help")
    return tuple(way for way in WAYS if names is None or way is WHOLE or way.name in names)


@torch.inference_mode()
def measure_decodes(
    config: Mapping[str, Any], model: ModelConfig, shapes: Mapping[str, PixelShape], ways: Sequence[Way], device: str
) -> Iterator[Row]:
    """A row for each shape, as soon as it is measured. `config` is a file's metadata; the first way is `WHOLE`."""
    decoder = random_video_decoder(config["vae"], device)
    noise = DecodeNoise(DECODE_TIMESTEP) if decoder.takes_noise else None
    video = DenoiserHparams.from_config(config["transformer"], has_audio=model.size.has_audio).video
    decoders = _decoders(decoder, ways)
    for label, pixels in shapes.items():
        shape, generator = latent_shape(pixels), torch.Generator(device).manual_seed(SEED)
        size = (1, config["vae"]["latent_channels"], shape.num_frames, shape.height, shape.width)
        latent = torch.randn(*size, device=device, generator=generator)
        limits = measure_ceilings(shape.num_video_tokens, video.num_heads, video.head_dim, device)
        calls = {
            way.name: partial(way.decode, decoders[way.name], latent, RenderShape(pixels, pixels), noise)
            for way in ways
        }
        facts = _compared(ways, calls, decoders, device)
        running = {name: partial(_run, calls[name]) for name, found in facts.items() if _may_run(found)}
        flops = model.size.decode_flops_per_pixel * pixels.num_frames * pixels.height * pixels.width
        floor_s = limits.floor_s(flops, in_float8=False)
        for name, all_s in in_turns(running, device).items():
            seconds = spread(all_s)
            tflops = flops / seconds["median_s"] / 1e12
            rates = {"tflops": tflops, "floor_s": floor_s} | limits.percentages(tflops)
            facts[name] = seconds | rates | facts[name] | judged(seconds["median_s"], floor_s)
        yield new_row(
            "decode", model=model.name, shape=label, device=device, tflop=flops / 1e12, ceilings=limits.as_facts(),
            contestants=facts,
        )  # fmt: skip


def _compared(
    ways: Sequence[Way],
    calls: Mapping[str, Callable[[], Iterator[YuvFrames]]],
    decoders: Mapping[str, VideoDecoder],
    device: str,
) -> dict[str, dict[str, Any]]:
    """Of each way: memory, and how far its pixels are from the whole decode's; or why it does not take part."""
    found: dict[str, dict[str, Any]] = {}
    wanted: list[np.ndarray] = []
    for way in ways:
        call = calls[way.name]
        try:
            decoded_bytes = added_bytes(partial(_run, call), device)
            facts = {} if not wanted else _differences(call(), wanted)
            if way is WHOLE:
                wanted = list(_frames(call()))
        except Exception as error:  # noqa: BLE001 - that one cannot take part is a result
            found[way.name] = failure_of(error)
            forget(device)
            continue
        if decoded_bytes is not None:
            facts["peak_gpu_memory_bytes"] = num_bytes(decoders[way.name].module) + decoded_bytes
        # A comparison with NaN is false.
        if wanted and way is not WHOLE and not way.blends and not facts["mean_levels"] <= _BOUND_LEVELS:
            got = facts["mean_levels"]
            facts["not_comparable"] = f"pixels must be within {_BOUND_LEVELS} levels of the whole's, got {got:.3g}"
        found[way.name] = facts
    return found


def _may_run(facts: Mapping[str, Any]) -> bool:
    return "failure" not in facts and "not_comparable" not in facts


def _run(call: Callable[[], Iterator[YuvFrames]]) -> None:
    for _ in call():
        pass


def _frames(chunks: Iterator[YuvFrames]) -> Iterator[np.ndarray]:
    return (frame for chunk in chunks for frame in chunk.planes)


def _differences(chunks: Iterator[YuvFrames], wanted: list[np.ndarray]) -> dict[str, Any]:
    """Mean and largest difference of bytes; frame by frame, since a clip of differences is gigabytes."""
    means, largest = [], 0
    for got, best in zip(_frames(chunks), wanted, strict=True):
        levels = np.abs(got.astype(np.int16) - best)
        means.append(float(levels.mean()))
        largest = max(largest, int(levels.max()))
    return {"mean_levels": sum(means) / len(means), "max_levels": largest}
