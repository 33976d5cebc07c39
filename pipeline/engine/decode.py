"""Latents to what a file needs: chunks of uint8 frames, cropped to the asked size, and a float32 waveform.

The networks are in `components/`; encoding to a file is `pipeline/media`.

Unless it is tiled, the picture is decoded whole: the published decoder looks ahead in time through every layer (20
latent frames in all), so chunks that give the same pixels would each decode nearly everything. What comes out is an
iterator all the same, so that only the decoded clip, not its uint8 copy and the encoder's planes, is in memory at once.

Shapes: B batch, C channels, F frames, H height, W width, T time, M mel bins, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.engine.components.audio_vae import AudioDecoder
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder
from pipeline.engine.components.vocoder import Vocoder
from pipeline.engine.tiling import Tiles
from pipeline.errors import EngineFault
from pipeline.geometry import PixelShape, RenderShape

CHUNK_FRAMES = 16


def decode_frames(
    decoder: VideoDecoder,
    latent_BCFHW: Tensor,
    shape: RenderShape,
    *,
    tiles: Tiles | None = None,
    noise: DecodeNoise | None = None,
    resize: bool = False,
) -> Iterator[np.ndarray]:
    """Chunks (F,H,W,3) of uint8 frames in order, of the asked size. Nothing is decoded before the first is taken.

    `tiles` bound the network's memory, `noise` is for decoders that take it (`VideoDecoder.decode`), `resize` brings
    pictures of another size to the rendered one. EngineFault if the decoder gives another number of frames, or without
    `resize` another size.
    """
    with torch.inference_mode():
        video_CFHW = decoder.decode(latent_BCFHW, tiles=tiles, noise=noise)[0]
        if resize:
            video_CFHW = _resized(video_CFHW, shape.rendered)
    expected = (3, shape.rendered.num_frames, shape.rendered.height, shape.rendered.width)
    if tuple(video_CFHW.shape) != expected:
        raise EngineFault(f"the video decoder gave {tuple(video_CFHW.shape)} values, expected {expected}")
    top, left = shape.crop_top_px, shape.crop_left_px
    cropped_CFHW = video_CFHW[:, :, top : top + shape.asked.height, left : left + shape.asked.width]
    for first in range(0, shape.asked.num_frames, CHUNK_FRAMES):
        yield _to_uint8(cropped_CFHW[:, first : first + CHUNK_FRAMES])


def decode_waveform(decoder: AudioDecoder, vocoder: Vocoder, latent_BCTM: Tensor) -> np.ndarray:
    """The sound (channels, samples) in [-1,1], float32, at the vocoder's rate. EngineFault if it is not finite."""
    with torch.inference_mode():
        waveform_CN = vocoder.synthesise(decoder.decode(latent_BCTM))[0].float().cpu()
    if not bool(torch.isfinite(waveform_CN).all()):
        raise EngineFault("the vocoder gave samples that are not finite numbers")
    return waveform_CN.numpy()


def _resized(video_CFHW: Tensor, rendered: PixelShape) -> Tensor:
    size = (rendered.height, rendered.width)
    if tuple(video_CFHW.shape[2:]) == size:
        return video_CFHW
    # LTX-Video's pipelines resize what a viewer would see: values out of range are cut before, not after.
    frames_FCHW = video_CFHW.clamp(-1, 1).transpose(0, 1)
    return functional.interpolate(frames_FCHW, size=size, mode="bilinear", align_corners=False).transpose(0, 1)


def _to_uint8(video_CFHW: Tensor) -> np.ndarray:
    # Clamping would turn NaN into no valid byte without a word.
    if not bool(torch.isfinite(video_CFHW).all()):
        raise EngineFault("the video decoder gave pixels that are not finite numbers")
    unit_CFHW = (video_CFHW.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit_CFHW * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
