"""Latents to what a file needs: chunks of frames as bytes, cropped to the asked size, and a float32 waveform.

The networks are in `components/`; encoding to a file is `pipeline/media`.

The picture is decoded frame by frame and handed out in chunks; in tiles, or by a decoder that cannot stream, it is
decoded whole and only its conversion goes by chunks. Each travels to the host while the next one is decoded.

Shapes: B batch, C channels, F frames, H height, W width, T time, M mel bins, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.engine.components.audio_vae import AudioDecoder
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder
from pipeline.engine.components.vocoder import Vocoder
from pipeline.engine.tiling import Tiles
from pipeline.errors import EngineFault
from pipeline.geometry import TEMPORAL_CELL_FRAMES, PixelShape, RenderShape
from pipeline.records.frames import YuvFrames

# At 1920x1088 a latent frame's eight frames take 0.1 GB in 16 bits. The plain conversion to bytes takes 0.8 GB more.
CHUNK_LATENT_FRAMES = 2
SMALL_CHUNK_LATENT_FRAMES = 1


@dataclass(frozen=True)
class Delivery:
    """How frames leave the device: those of so many latent frames at a time, the last time fewer.

    Without `with_planes` they stay there: what is handed out counts them and has no rows.
    """

    chunk_latent_frames: int = CHUNK_LATENT_FRAMES
    with_planes: bool = True


DELIVERED = Delivery()


def decode_frames(
    decoder: VideoDecoder,
    latent_BCFHW: Tensor,
    shape: RenderShape,
    *,
    tiles: Tiles | None = None,
    noise: DecodeNoise | None = None,
    resize: bool = False,
    delivery: Delivery = DELIVERED,
) -> Iterator[YuvFrames]:
    """Chunks of frames in order, of the asked size. Nothing is decoded before the first is taken.

    `noise` is for decoders that take it (`VideoDecoder.decode`), `resize` brings pictures of another size to the
    rendered one, `tiles` change what lies near their seams. `delivery` changes no bit of a frame, and not what is found
    wrong: EngineFault if the decoder gives another number of frames, without `resize` another size, or pixels that are
    not finite.
    """
    rendered, asked = shape.rendered, shape.asked
    top, left, num_frames = shape.crop_top_px, shape.crop_left_px, 0
    to_host, arrive = _ToHost(latent_BCFHW.device), None
    size = delivery.chunk_latent_frames * TEMPORAL_CELL_FRAMES
    for video_CFHW in _chunks(decoder, latent_BCFHW, tiles, noise, size):
        if resize:
            video_CFHW = _resized(video_CFHW, rendered)
        num_frames += video_CFHW.shape[1]
        _require_shape(video_CFHW, num_frames, rendered)
        with torch.inference_mode():
            cropped_CFHW = video_CFHW[:, :, top : top + asked.height, left : left + asked.width]
            planes_FRW, num_wrong = decoder.ops.rgb_to_yuv420(cropped_CFHW)
            leaving = to_host.send(planes_FRW if delivery.with_planes else planes_FRW[:, :0], num_wrong)
        # Not kept while the next chunk is decoded.
        del video_CFHW, cropped_CFHW, planes_FRW
        if arrive is not None:
            yield arrive()
        arrive = leaving
    if arrive is not None:
        yield arrive()
    if num_frames != rendered.num_frames:
        raise EngineFault(f"the video decoder gave {num_frames} frames, expected {rendered.num_frames}")


def _chunks(
    decoder: VideoDecoder, latent_BCFHW: Tensor, tiles: Tiles | None, noise: DecodeNoise | None, size: int
) -> Iterator[Tensor]:
    """Pixels (3,F,H,W) of up to `size` frames."""
    if tiles is not None or not decoder.can_stream:
        with torch.inference_mode():
            video_CFHW = decoder.decode(latent_BCFHW, tiles=tiles, noise=noise)[0]
        yield from video_CFHW.split(size, dim=1)
        return
    with torch.inference_mode():
        frames = decoder.stream(latent_BCFHW, noise=noise)
    while taken := _taken(frames, size):
        yield taken.pop()


def _taken(frames: Iterator[Tensor], size: int) -> list[Tensor]:
    """The next chunk, in a list so that whoever hands it on can let go of it; nothing after the last."""
    # Around each chunk, not around all of them: whoever takes them is not in this mode.
    with torch.inference_mode():
        chunk = [frame_B3FHW[0] for frame_B3FHW in islice(frames, size)]
        return [torch.cat(chunk, dim=1)] if chunk else []


def _require_shape(video_CFHW: Tensor, num_frames: int, rendered: PixelShape) -> None:
    given = tuple(video_CFHW.shape)
    if given != (3, given[1], rendered.height, rendered.width) or num_frames > rendered.num_frames:
        expected = (3, rendered.num_frames, rendered.height, rendered.width)
        raise EngineFault(f"the video decoder gave {given} values up to frame {num_frames}, expected {expected}")


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


class _ToHost:
    """Sends chunks to the host by a stream of their own, so that a GPU computes the next one meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, planes_FRW: Tensor, num_wrong: Tensor) -> Callable[[], YuvFrames]:
        """Begin with a chunk and the number of its values that are not finite; what is returned waits for both."""
        if self._stream is None:
            return partial(_arrived, planes_FRW, num_wrong)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            planes, num = (_pinned_copy(tensor, self._stream) for tensor in (planes_FRW, num_wrong))
            done = self._stream.record_event()
        return partial(_arrived, planes, num, done)


def _pinned_copy(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    # The memory is not for others before this stream has read it.
    tensor.record_stream(stream)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _arrived(planes_FRW: Tensor, num_wrong: Tensor, done: torch.cuda.Event | None = None) -> YuvFrames:
    if done is not None:
        done.synchronize()
    # Cut to a byte's range, NaN would be some valid byte without a word.
    if num_wrong.item():
        raise EngineFault("the video decoder gave pixels that are not finite numbers")
    return YuvFrames(planes_FRW.numpy())
