"""The video decoder, a few frames at a time: the whole decode's pixels from some frames of context at each layer.

Every convolution in time keeps the frames that its next answer needs; where it looks ahead it answers later, and what
goes round it waits as long. Layers pull blocks of frames from each other, so the end of a clip reaches each layer when
the one before it has run out. Nothing is computed twice, and a clip's length costs no memory.

Libraries choose the order of a sum by the shape of what they are given. So which frames go through a layer together is
fixed by the layer, by the constant `frames_per_convolution` and by the clip's length alone, and a frame's bits are the
same however frames are taken, held or handed out. Where one block holds the whole clip, they are the whole decode's.

Activations lie in memory as the weights do, and channels last in the fused way. Knows the layers of diffusers' decoder
and shares their weights; loading and latents are `video_vae.py`'s.

Shapes: B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

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
from torch.nn import functional

from kernels.ops import OpSet

NeighboursFn = Callable[[Tensor, int], tuple[Tensor | None, Tensor | None]]
"""(rows of some frames, BCFHW; how many) -> so many rows above them and below them; None at the picture's edge"""

# A change of either changes bits: raise RENDER_REVISION with it. On a GPU more frames fill it better: on one H200
# 1920x1088x121 of LTX-2.0 took 0.984 s by one frame, 0.725 s and 6.2 GB by 8, 0.699 s and 21 GB by 32.
FRAMES_PER_CONVOLUTION = 1
GPU_FRAMES_PER_CONVOLUTION = 8


@dataclass(frozen=True)
class Manner:
    """How all layers of one decode work: at most so many frames at once, by `fused` operations or the library's.

    Memory grows with the frames. With `fused`, what a convolution takes is written in one pass, norm, activation and
    margin together, and its bias is added by whatever reads its answer next; activations then lie channels last. With
    `neighbours`, what is decoded are some rows of the picture, and others decode those above and below.
    """

    frames_per_convolution: int = FRAMES_PER_CONVOLUTION
    fused: OpSet | None = None
    neighbours: NeighboursFn | None = None


class _Block(NamedTuple):
    """Consecutive frames (B,C,F,H,W), and if the clip ends with them."""

    frames: Tensor
    is_last: bool


@dataclass(frozen=True)
class _Pass:
    """What every layer of one decode is told."""

    manner: Manner
    is_causal: bool
    timestep_B: Tensor | None
    dtype: torch.dtype


_Modulation = tuple[Tensor, Tensor]
"""Scale and shift after a norm, (B,C,1,1,1)."""


@dataclass(frozen=True)
class _Activation:
    """Norm, modulation and SiLU of what a convolution takes.

    `bias_C` is that of the convolution before, which the fused way leaves to this one.
    """

    norm: Any
    activate: Any
    modulation: _Modulation | None
    bias_C: Tensor | None = None

    def by_library(self, frames: Tensor) -> Tensor:
        normed = self.norm(frames)
        if self.modulation is not None:
            scale, shift = self.modulation
            normed = normed * (1 + scale) + shift
        activated: Tensor = self.activate(normed)
        return activated

    def framed(self, fused: OpSet, parts: list[Tensor], margin: tuple[int, int], *, reflects: bool) -> Tensor:
        return fused.framed_norm_silu(parts, self.bias_C, self.modulation, self.norm.eps, margin, reflects)


def can_stream(decoder: LTX2VideoDecoder3d) -> bool:
    """False for decoders that draw noise as they go: a frame's noise would depend on when it is decoded."""
    blocks = [module for module in decoder.modules() if isinstance(module, LTX2VideoResnetBlock3d)]
    return all(block.per_channel_scale1 is None for block in blocks)


def stream_frames(
    decoder: LTX2VideoDecoder3d, latent_BCFHW: Tensor, timestep_B: Tensor | None, manner: Manner
) -> Iterator[Tensor]:
    """Frames (B,3,1,H,W) of what `decoder` makes of the whole latent, in order; the work is done as they are taken."""
    if timestep_B is not None:
        assert decoder.timestep_scale_multiplier is not None, "a decoder that is told a timestep has it"
        timestep_B = timestep_B * decoder.timestep_scale_multiplier
    if manner.fused is not None or _is_channels_last(decoder.conv_in.conv.weight):
        latent_BCFHW = latent_BCFHW.contiguous(memory_format=torch.channels_last_3d)
    way = _Pass(manner, decoder.is_causal, timestep_B, latent_BCFHW.dtype)
    blocks = _regrouped(iter([_Block(latent_BCFHW, is_last=True)]), way, skip=0)
    blocks = _with_bias(decoder.conv_in, _convolved(decoder.conv_in, blocks, way), way)
    for block in (decoder.mid_block, *decoder.up_blocks):
        blocks = _through_block(block, blocks, way)
    (modulation,) = _modulations(decoder, _embedded(decoder, way), count=1)
    activation = _Activation(decoder.norm_out, decoder.conv_act, modulation)
    blocks = _with_bias(decoder.conv_out, _convolved(decoder.conv_out, blocks, way, activation), way)
    patch = (decoder.patch_size_t, decoder.patch_size, decoder.patch_size)
    # In a patch the channels run down before they run across, in an upsampler's cell across before down.
    pixels = map(lambda block: _spread(block.frames.unflatten(1, (-1, *patch)).transpose(3, 4)), blocks)
    return chain.from_iterable(map(lambda frames_B3FHW: frames_B3FHW.split(1, dim=2), pixels))


def _through_block(
    block: LTX2VideoMidBlock3d | LTX2VideoUpBlock3d, blocks: Iterator[_Block], way: _Pass
) -> Iterator[_Block]:
    for upsampler in getattr(block, "upsamplers", None) or ():
        blocks = _upsampled(upsampler, blocks, way)
    embedding = _embedded(block, way)
    for resnet in block.resnets:
        blocks = _through_resnet(resnet, blocks, embedding, way)
    return blocks


def _convolved(
    layer: LTX2VideoCausalConv3d, blocks: Iterator[_Block], way: _Pass, activation: _Activation | None = None
) -> Iterator[_Block]:
    """The first frame stands for what is before the clip, the last for what is after it.

    In the fused way the answers lack their bias, and a frame is normed again for each convolution that takes it: the
    two of context are cheap beside a pass of its own for all.
    """
    if activation is not None and way.manner.fused is None:
        blocks = _mapped(activation.by_library, blocks)
    context = layer.kernel_size[0] - 1
    ahead = 0 if way.is_causal else context // 2
    size = way.manner.frames_per_convolution
    window: list[Tensor] = []
    for frames, is_last in blocks:
        if not window:
            window = [frames[:, :, :1]] * (context - ahead)
        window.append(frames)
        if is_last:
            window.extend([frames[:, :, -1:]] * ahead)
        # Here and below: not kept while the layers behind this one work.
        del frames
        num_answers = sum(part.shape[2] for part in window) - context
        while num_answers > 0:
            count = min(size, num_answers)
            num_answers -= count
            taken, window = _taken(window, count + context), _without(window, count)
            yield _Block(_answer(layer, taken, way.manner, activation), is_last and num_answers == 0)


def _taken(parts: list[Tensor], count: int) -> list[Tensor]:
    """The first `count` frames."""
    taken = []
    for part in parts:
        if count > 0:
            taken.append(part[:, :, :count])
        count -= part.shape[2]
    return taken


def _without(parts: list[Tensor], count: int) -> list[Tensor]:
    """All but the first `count` frames."""
    rest = []
    for part in parts:
        left = part[:, :, max(count, 0) :]
        if left.shape[2]:
            # A short rest of a long part is copied, or it would keep all of it.
            rest.append(left.clone() if left.shape[2] < count else left)
        count -= part.shape[2]
    return rest


def _answer(
    layer: LTX2VideoCausalConv3d, taken: list[Tensor], manner: Manner, activation: _Activation | None
) -> Tensor:
    conv, fused = layer.conv, manner.fused
    layout = torch.channels_last_3d if _is_channels_last(conv.weight) else torch.contiguous_format
    reflects = conv.padding_mode == "reflect"
    if fused is None and not reflects and manner.neighbours is None:
        joined_BCFHW = torch.cat(taken, dim=2).contiguous(memory_format=layout)
        taken.clear()
        padded: Tensor = conv(joined_BCFHW)
        return padded
    # The library's reflection is a pass of its own, on a GPU forgets where channels lie, and knows no neighbours.
    margin = conv.kernel_size[1] // 2, conv.kernel_size[2] // 2
    if fused is None:
        joined_BCFHW = _framed(taken, layout, margin, reflects=reflects)
    elif activation is None:
        joined_BCFHW = fused.framed(taken, margin, reflects)
    else:
        joined_BCFHW = activation.framed(fused, taken, margin, reflects=reflects)
    if manner.neighbours is not None:
        _take_rows(joined_BCFHW, margin[0], manner.neighbours)
    taken.clear()
    # A GPU's convolution adds its bias in a pass of its own, one number a thread.
    bias_C = conv.bias if fused is None else None
    answer = functional.conv3d(joined_BCFHW, conv.weight, bias_C, conv.stride, 0, conv.dilation, conv.groups)
    # So cuDNN's lie already; where a library falls back to another convolution, its answer may not.
    return answer if fused is None else answer.contiguous(memory_format=torch.channels_last_3d)


def _take_rows(framed_BCFHW: Tensor, rows: int, neighbours: NeighboursFn) -> None:
    """Margins become what the neighbours have within, where there are neighbours; all columns are made alike."""
    height = framed_BCFHW.shape[3] - 2 * rows
    above, below = neighbours(framed_BCFHW[..., rows : rows + height, :], rows)
    if above is not None:
        framed_BCFHW[..., :rows, :] = above
    if below is not None:
        framed_BCFHW[..., rows + height :, :] = below


def _with_bias(layer: LTX2VideoCausalConv3d, blocks: Iterator[_Block], way: _Pass) -> Iterator[_Block]:
    """Answers of `_convolved` with what the fused way has left out of them."""
    fused, bias_C = way.manner.fused, layer.conv.bias
    if fused is None or bias_C is None:
        return blocks
    return _mapped(lambda frames: fused.add_with_bias_(frames, bias_C, ()), blocks)


def _framed(parts: list[Tensor], layout: torch.memory_format, margin: tuple[int, int], *, reflects: bool) -> Tensor:
    """The parts one after the other, in a margin of rows and columns: zeros, or what lies within their edges."""
    rows, columns = margin
    batch, channels, _, height, width = parts[0].shape
    framed = torch.empty(
        (batch, channels, sum(part.shape[2] for part in parts), height + 2 * rows, width + 2 * columns),
        dtype=parts[0].dtype,
        device=parts[0].device,
        memory_format=layout,
    )
    inner, begin = framed[..., rows : rows + height, columns : columns + width], 0
    for part in parts:
        inner[:, :, begin : begin + part.shape[2]] = part
        begin += part.shape[2]
    within = framed[..., columns : columns + width]
    for step in range(1, rows + 1):
        within[..., rows - step, :] = within[..., rows + step, :] if reflects else 0
        within[..., rows + height - 1 + step, :] = within[..., rows + height - 1 - step, :] if reflects else 0
    for step in range(1, columns + 1):
        framed[..., columns - step] = framed[..., columns + step] if reflects else 0
        framed[..., columns + width - 1 + step] = framed[..., columns + width - 1 - step] if reflects else 0
    return framed


def _through_resnet(resnet: Any, blocks: Iterator[_Block], embedding: Tensor | None, way: _Pass) -> Iterator[_Block]:
    modulations, waiting = _modulations(resnet, embedding, count=2), _Waiting()
    first = _Activation(resnet.norm1, resnet.nonlinearity, modulations[0])
    second = _Activation(resnet.norm2, resnet.nonlinearity, modulations[1], resnet.conv1.conv.bias)
    hidden = _convolved(resnet.conv1, waiting.noting(blocks), way, first)
    hidden = _convolved(resnet.conv2, hidden, way, second)
    fused, bias_C = way.manner.fused, resnet.conv2.conv.bias
    if fused is None:
        return _mapped(waiting.added_to, hidden)
    return _mapped(lambda frames: fused.add_with_bias_(frames, bias_C, waiting.take_parts(frames.shape[2])), hidden)


def _upsampled(layer: LTX2VideoUpsampler3d, blocks: Iterator[_Block], way: _Pass) -> Iterator[_Block]:
    """Each frame becomes `layer.stride[0]` frames of larger sides; the clip's first gives only the last of them."""
    stride, waiting = layer.stride, _Waiting()
    repeats = stride[0] * stride[1] * stride[2] // layer.upscale_factor

    def enlarged(frames: Tensor) -> Tensor:
        larger = _spread(frames.unflatten(1, (-1, *stride)))
        around = waiting.take(frames.shape[2])
        if layer.residual:
            larger.unflatten(1, (repeats, -1)).add_(_spread(around.unflatten(1, (-1, *stride))).unsqueeze(1))
        return larger

    answers = _with_bias(layer.conv, _convolved(layer.conv, waiting.noting(blocks), way), way)
    return _regrouped(_mapped(enlarged, answers), way, skip=stride[0] - 1)


def _regrouped(blocks: Iterator[_Block], way: _Pass, *, skip: int) -> Iterator[_Block]:
    """Blocks of as many frames as a convolution takes, the last one fewer; without the clip's first `skip` frames."""
    size, held = way.manner.frames_per_convolution, list[Tensor]()
    for frames, is_last in blocks:
        held.append(frames[:, :, skip:])
        skip = 0
        del frames
        num_held = sum(part.shape[2] for part in held)
        while num_held >= size or (is_last and num_held):
            num_held = max(num_held - size, 0)
            taken, held = _taken(held, size), _without(held, size)
            yield _Block(_joined(taken), is_last and num_held == 0)


def _spread(cells_BCTYXFHW: Tensor) -> Tensor:
    """Channels (T,Y,X) of each place become its frames, rows and columns: (B, C, F*T, H*Y, W*X)."""
    if cells_BCTYXFHW.stride(7) > 1:  # channels lie next to each other, and shall
        last = cells_BCTYXFHW.permute(0, 5, 2, 6, 3, 7, 4, 1).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return last.movedim(-1, 1)
    return cells_BCTYXFHW.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class _Waiting:
    """Frames on their way round layers that answer later."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def noting(self, blocks: Iterator[_Block]) -> Iterator[_Block]:
        """The same blocks, whose frames wait from then on."""

        def note(frames: Tensor) -> Tensor:
            self._parts.append(frames)
            return frames

        return _mapped(note, blocks)

    def take(self, count: int) -> Tensor:
        """The `count` frames that have waited longest."""
        return _joined(self.take_parts(count))

    def added_to(self, frames: Tensor) -> Tensor:
        """`frames`, to which as many that wait are added in place."""
        begin = 0
        for part in self.take_parts(frames.shape[2]):
            # Not `+=` on a slice, which copies it onto itself afterwards.
            frames.narrow(2, begin, part.shape[2]).add_(part)
            begin += part.shape[2]
        return frames

    def take_parts(self, count: int) -> list[Tensor]:
        """The same, as they lie."""
        taken, self._parts = _taken(self._parts, count), _without(self._parts, count)
        return taken


def _mapped(change: Callable[[Tensor], Tensor], blocks: Iterator[_Block]) -> Iterator[_Block]:
    # Not a loop: it would keep the block it is at for as long as the layers behind it work.
    return map(lambda block: _Block(change(block.frames), block.is_last), blocks)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.stride(-1) > 1


def _embedded(owner: Any, way: _Pass) -> Tensor | None:
    """The timestep as the blocks of `owner` are told it, (B,C,1,1,1)."""
    if way.timestep_B is None:
        return None
    embedding: Tensor = owner.time_embedder(
        timestep=way.timestep_B.flatten(),
        resolution=None,
        aspect_ratio=None,
        batch_size=way.timestep_B.shape[0],
        hidden_dtype=way.dtype,
    )
    return embedding[..., None, None, None]


def _modulations(owner: Any, embedding: Tensor | None, *, count: int) -> list[_Modulation | None]:
    """What follows each norm, from the timestep and a table; nothing where there is no timestep."""
    if embedding is None:
        return [None] * count
    table_KC111 = owner.scale_shift_table[..., None, None, None]
    rows = (embedding.unflatten(1, (2 * count, -1)) + table_KC111).unbind(dim=1)
    return list(zip(rows[1::2], rows[::2], strict=True))
