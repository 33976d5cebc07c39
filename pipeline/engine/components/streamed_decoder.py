"""The video decoder, frame by frame: the whole decode's pixels from a few frames of context at each layer.

Every convolution in time keeps the frames that its next answer needs; where it looks ahead it answers later, and what
goes round it waits as long. Layers pull frames from each other, so the end of a clip reaches each layer when the one
before it has run out. Nothing is computed twice, and a clip's length costs no memory.

All arithmetic is on one frame at a time. Libraries choose the order of a sum by the shape of what they are given, so
this is what makes a frame's bits the same whatever is decoded, held or handed out beside it.

Knows the layers of diffusers' decoder and shares their weights; loading and latents are `video_vae.py`'s.

Shapes: B batch, C channels, F frames, H height, W width. A frame is a tensor of F = 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    LTX2VideoCausalConv3d,
    LTX2VideoDecoder3d,
    LTX2VideoMidBlock3d,
    LTX2VideoResnetBlock3d,
    LTX2VideoUpBlock3d,
    LTX2VideoUpsampler3d,
)
from torch import Tensor


def can_stream(decoder: LTX2VideoDecoder3d) -> bool:
    """False for decoders that draw noise as they go: a frame's noise would depend on when it is decoded."""
    blocks = [module for module in decoder.modules() if isinstance(module, LTX2VideoResnetBlock3d)]
    return all(block.per_channel_scale1 is None for block in blocks)


def stream_frames(decoder: LTX2VideoDecoder3d, latent_BCFHW: Tensor, timestep_B: Tensor | None) -> Iterator[Tensor]:
    """Frames (B,3,1,H,W) of what `decoder` makes of the whole latent, in order; the work is done as they are taken."""
    is_causal = decoder.is_causal
    if timestep_B is not None:
        assert decoder.timestep_scale_multiplier is not None, "a decoder that is told a timestep has it"
        timestep_B = timestep_B * decoder.timestep_scale_multiplier
    frames = _convolved(decoder.conv_in, iter(latent_BCFHW.split(1, dim=2)), is_causal)
    for block in (decoder.mid_block, *decoder.up_blocks):
        frames = _through_block(block, frames, _embedded(block, timestep_B, latent_BCFHW), is_causal)
    (modulate,) = _modulations(decoder, _embedded(decoder, timestep_B, latent_BCFHW), count=1)
    norm, activate = decoder.norm_out, decoder.conv_act
    frames = _convolved(decoder.conv_out, map(lambda frame: activate(modulate(norm(frame))), frames), is_causal)
    patch = (decoder.patch_size_t, decoder.patch_size, decoder.patch_size)
    # In a patch the channels run down before they run across, in an upsampler's cell across before down.
    return map(lambda frame: _spread(frame.unflatten(1, (-1, *patch)).transpose(3, 4)), frames)


def _through_block(
    block: LTX2VideoMidBlock3d | LTX2VideoUpBlock3d, frames: Iterator[Tensor], embedding: Tensor | None, is_causal: bool
) -> Iterator[Tensor]:
    for upsampler in getattr(block, "upsamplers", None) or ():
        frames = _upsampled(upsampler, frames, is_causal)
    for resnet in block.resnets:
        frames = _through_resnet(resnet, frames, embedding, is_causal)
    return frames


def _convolved(layer: LTX2VideoCausalConv3d, frames: Iterator[Tensor], is_causal: bool) -> Iterator[Tensor]:
    """The first frame stands for what is before the clip, the last for what is after it."""
    size = layer.kernel_size[0]
    ahead = 0 if is_causal else (size - 1) // 2
    window = deque[Tensor]()
    for frame in frames:
        if not window:
            window.extend([frame] * (size - 1 - ahead))
        window.append(frame)
        if len(window) == size:
            yield _answer(layer, window)
    for _ in range(ahead):
        window.append(window[-1])
        if len(window) == size:
            yield _answer(layer, window)


def _answer(layer: LTX2VideoCausalConv3d, window: deque[Tensor]) -> Tensor:
    joined_BCFHW = torch.cat(tuple(window), dim=2)
    # Let go before the convolution takes its memory.
    window.popleft()
    answer: Tensor = layer.conv(joined_BCFHW)
    return answer


def _through_resnet(
    resnet: Any, frames: Iterator[Tensor], embedding: Tensor | None, is_causal: bool
) -> Iterator[Tensor]:
    first, second = _modulations(resnet, embedding, count=2)
    activate = resnet.nonlinearity
    waiting = deque[Tensor]()
    # Not loops: a loop would keep the frame it is at for as long as the layers behind it work.
    hidden: Iterator[Tensor] = map(lambda frame: activate(first(resnet.norm1(frame))), _noted(frames, waiting))
    hidden = _convolved(resnet.conv1, hidden, is_causal)
    hidden = map(lambda frame: activate(second(resnet.norm2(frame))), hidden)
    hidden = _convolved(resnet.conv2, hidden, is_causal)
    return map(lambda frame: frame + waiting.popleft(), hidden)


def _upsampled(layer: LTX2VideoUpsampler3d, frames: Iterator[Tensor], is_causal: bool) -> Iterator[Tensor]:
    """Each frame becomes `layer.stride[0]` frames of larger sides; the clip's first gives only the last of them."""
    stride, waiting = layer.stride, deque[Tensor]()
    repeats = stride[0] * stride[1] * stride[2] // layer.upscale_factor

    def enlarged(frame: Tensor) -> Tensor:
        larger, around = _spread(frame.unflatten(1, (-1, *stride))), waiting.popleft()
        if not layer.residual:
            return larger
        return larger + _spread(around.unflatten(1, (-1, *stride))).repeat(1, repeats, 1, 1, 1)

    answers = _convolved(layer.conv, _noted(frames, waiting), is_causal)
    finer = chain.from_iterable(map(lambda frame: enlarged(frame).split(1, dim=2), answers))
    return islice(finer, stride[0] - 1, None)


def _spread(cells_BCTYXFHW: Tensor) -> Tensor:
    """Channels (T,Y,X) of each place become its frames, rows and columns: (B, C, F*T, H*Y, W*X)."""
    return cells_BCTYXFHW.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _noted(frames: Iterator[Tensor], waiting: deque[Tensor]) -> Iterator[Tensor]:
    """The same frames, each kept in `waiting` for what goes round the layers in between."""

    def note(frame: Tensor) -> Tensor:
        waiting.append(frame)
        return frame

    return map(note, frames)


def _embedded(owner: Any, timestep_B: Tensor | None, latent_BCFHW: Tensor) -> Tensor | None:
    """The timestep as the blocks of `owner` are told it, (B,C,1,1,1)."""
    if timestep_B is None:
        return None
    embedding: Tensor = owner.time_embedder(
        timestep=timestep_B.flatten(),
        resolution=None,
        aspect_ratio=None,
        batch_size=latent_BCFHW.shape[0],
        hidden_dtype=latent_BCFHW.dtype,
    )
    return embedding[..., None, None, None]


def _modulations(owner: Any, embedding: Tensor | None, *, count: int) -> list[Callable[[Tensor], Tensor]]:
    """A shift and a scale after each norm, from the timestep and a table; nothing where there is no timestep."""
    if embedding is None:
        return [lambda frame: frame] * count
    table_KC111 = owner.scale_shift_table[..., None, None, None]
    rows = (embedding.unflatten(1, (2 * count, -1)) + table_KC111).unbind(dim=1)
    return [_modulation(shift, scale) for shift, scale in zip(rows[::2], rows[1::2], strict=True)]


def _modulation(shift: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda frame: frame * (1 + scale) + shift
