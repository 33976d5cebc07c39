"""The video autoencoder of every published model: pictures and clips to latents, latents to pixels.

One family: LTX-2.0, LTX-2.3 and LTX-Video differ in their lists of blocks, their padding, and in whether the decoder is
told how noisy its latent is. Tiles are cut and blended in `pipeline/engine/tiling.py`.

Shapes: B batch, C channels, F frames, H height, W width; frames are 8k+1, height and width multiples of 32 pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    LTX2VideoCausalConv3d,
    LTX2VideoDecoder3d,
    LTX2VideoEncoder3d,
)
from torch import Tensor, nn

from kernels.ops import OpSet, reference_ops
from pipeline.engine.components.blueprint import Blueprint, load_statistics, section
from pipeline.engine.components.streamed_decoder import (
    GPU_FRAMES_PER_CONVOLUTION,
    Manner,
    can_stream,
    stream_frames,
)
from pipeline.engine.latents import ChannelStatistics
from pipeline.engine.tiling import Tiles, decode_in_tiles, encode_in_tiles
from pipeline.errors import UsageError
from pipeline.model.checkpoint import CheckpointFile

PLAIN_OPS = reference_ops()
# Of a picture that several processes decode: each convolution asks the neighbours for rows, which takes the host's time
# (355 exchanges a clip of 121 frames; 2,535 of one frame at a time). Bits may differ from those of one process anyway.
SHARED_FRAMES_PER_CONVOLUTION = 8
_UPSAMPLE_TYPES = {"compress_all": "spatiotemporal", "compress_space": "spatial", "compress_time": "temporal"}
_DOWNSAMPLE_TYPES = {f"{kind}_res": name for kind, name in _UPSAMPLE_TYPES.items()}
# Width of the outermost blocks where a file does not say; LTX-Video files do not.
_PUBLISHED_BASE_CHANNELS = 128
# The reference bounds the encoder's log-variance before it draws.
_LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


@dataclass(frozen=True)
class DecodeNoise:
    """What a decoder told of noise is given: normalised latents move towards `noise_BCFHW` by `scale` beforehand."""

    timestep: float
    scale: float = 0.0
    noise_BCFHW: Tensor | None = None


class SharedRows(Protocol):
    """Some rows of a picture that is decoded by several processes, each of which has others."""

    def part(self, latent_BCFHW: Tensor) -> Tensor:
        """The rows that are decoded here."""

    def neighbours(self, rows_BCFHW: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
        """See `NeighboursFn`."""

    def whole(self, frame_B3FHW: Tensor) -> Tensor:
        """A frame of which every process has its rows."""


class VideoDecoder:
    """Normalised video latents (B,C,F,H,W) to pixels (B,3,8F-7,32H,32W), roughly in [-1,1], not clamped.

    `takes_noise` says if it must be given a `DecodeNoise`, `can_stream` if it can go frame by frame; `ops` are what its
    device has, `manner` how a stream goes.
    """

    def __init__(
        self,
        module: LTX2VideoDecoder3d,
        statistics: ChannelStatistics,
        *,
        takes_noise: bool = False,
        ops: OpSet = PLAIN_OPS,
    ) -> None:
        self.module = module
        self.statistics = statistics
        self.ops = ops
        self.manner = Manner()
        # From a latent's number of rows to those decoded here; None if all are.
        self.share_rows: Callable[[int], SharedRows | None] = lambda num_rows: None
        self.takes_noise = takes_noise
        self.can_stream = can_stream(module)

    def decode(self, latent_BCFHW: Tensor, *, tiles: Tiles | None = None, noise: DecodeNoise | None = None) -> Tensor:
        """Pixels in the weights' dtype; blended from `tiles` if given, which differs near their seams."""
        latent, timestep = self._prepared(latent_BCFHW, noise)

        def decode_one(tile_BCFHW: Tensor) -> Tensor:
            pixels: Tensor = self.module(tile_BCFHW, timestep)
            return pixels

        return decode_one(latent) if tiles is None else decode_in_tiles(decode_one, latent, tiles)

    def stream(self, latent_BCFHW: Tensor, *, noise: DecodeNoise | None = None) -> Iterator[Tensor]:
        """The frames (B,3,1,32H,32W) of `decode` in order, in memory that does not grow with the clip.

        A frame's bits do not depend on how the frames are taken; `decode` rounds sums otherwise. Only if `can_stream`.
        """
        latent, timestep = self._prepared(latent_BCFHW, noise)
        shared = self.share_rows(latent.shape[3])
        if shared is None:
            return stream_frames(self.module, latent, timestep, self.manner)
        manner = replace(
            self.manner,
            frames_per_convolution=max(self.manner.frames_per_convolution, SHARED_FRAMES_PER_CONVOLUTION),
            neighbours=shared.neighbours,
        )
        return map(shared.whole, stream_frames(self.module, shared.part(latent), timestep, manner))

    def _prepared(self, latent_BCFHW: Tensor, noise: DecodeNoise | None) -> tuple[Tensor, Tensor | None]:
        """Latents as the network takes them, and the timestep (B) it is told."""
        if self.takes_noise != (noise is not None):
            rule = "must be given a decode timestep" if self.takes_noise else "takes no decode timestep"
            raise UsageError(f"this model's video decoder {rule}, got {noise}; correct the recipe")
        latent = latent_BCFHW.float()
        timestep = None
        if noise is not None:
            timestep = torch.full((latent.shape[0],), noise.timestep, device=latent.device)
            if noise.noise_BCFHW is not None:
                latent = torch.lerp(latent, noise.noise_BCFHW.to(latent), noise.scale)
        return self.statistics.unnormalise(latent, dim=1).to(_dtype(self.module)), timestep


class VideoEncoder:
    """Pixels (B,3,F,H,W) in [-1,1] to normalised video latents (B,C,(F+7)/8,H/32,W/32), float32."""

    def __init__(self, module: nn.Module, statistics: ChannelStatistics) -> None:
        self._module = module
        self.statistics = statistics

    def encode(
        self, video_BCFHW: Tensor, *, tiles: Tiles | None = None, noise: Callable[[torch.Size], Tensor] | None = None
    ) -> Tensor:
        """The posterior's mean, as LTX-2 does; with `noise` (shape to standard normal values) a draw from it.

        LTX-Video's pipelines draw. `tiles` bound the memory and change what lies near their seams.
        """

        def encode_one(tile_BCFHW: Tensor) -> Tensor:
            mean, log_variance = self.moments(tile_BCFHW)
            if noise is None:
                return mean
            return mean + torch.exp(0.5 * log_variance) * noise(mean.shape).to(mean)

        latent = encode_one(video_BCFHW) if tiles is None else encode_in_tiles(encode_one, video_BCFHW, tiles)
        return self.statistics.normalise(latent, dim=1)

    def moments(self, video_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, not normalised, float32."""
        mean, log_variance = self._module(video_BCFHW.to(_dtype(self._module))).float().chunk(2, dim=1)
        return mean, log_variance.clamp(*_LOG_VARIANCE_BOUNDS)


def load_video_decoder(
    checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None, ops: OpSet = PLAIN_OPS
) -> VideoDecoder:
    """Video decoder of a single-file checkpoint, with its channel statistics in float32."""
    vae = section(checkpoint.config, "vae")
    module = video_decoder_blueprint(vae).fill(checkpoint, device=device, dtype=dtype, what="the video decoder")
    module = laid_out(module, device)
    statistics = load_statistics(checkpoint, "vae", num_channels=vae["latent_channels"], device=device)
    decoder = VideoDecoder(module, statistics, takes_noise=vae.get("timestep_conditioning", False), ops=ops)
    decoder.manner = manner_on(device, ops)
    return decoder


def manner_on(device: str, ops: OpSet) -> Manner:
    """How production decodes on a device of this kind: the same on every rung of memory, for it changes bits."""
    if torch.device(device).type == "cuda":
        return Manner(GPU_FRAMES_PER_CONVOLUTION, fused=ops)
    return Manner()


def laid_out(decoder: Any, device: str) -> Any:
    """A decoder's module with its weights as the device wants them in memory; the activations of a stream follow."""
    if torch.device(device).type == "cuda":
        # As cuDNN's convolutions in three dimensions do.
        return decoder.to(memory_format=torch.channels_last_3d)
    return decoder


def load_video_encoder(checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None) -> VideoEncoder:
    """Video encoder of a single-file checkpoint, with its channel statistics in float32."""
    vae = section(checkpoint.config, "vae")
    module = video_encoder_blueprint(vae).fill(checkpoint, device=device, dtype=dtype, what="the video encoder")
    return VideoEncoder(module, load_statistics(checkpoint, "vae", num_channels=vae["latent_channels"], device=device))


def video_decoder_blueprint(vae: dict[str, Any]) -> Blueprint:
    """Decoder of the `vae` section: residual blocks alternating with upsamplers, listed from the pixels inwards."""
    blocks, ups = _alternating(vae["decoder_blocks"], _UPSAMPLE_TYPES, "decoder")
    multipliers = [block["multiplier"] for _, block in ups]
    base = vae.get("decoder_base_channels", _PUBLISHED_BASE_CHANNELS)
    knows_noise = vae.get("timestep_conditioning", False)
    # One key for both directions wins over the pair; without any, LTX-2 reflects and LTX-Video pads with zeros.
    default = "zeros" if knows_noise else "reflect"
    # The library wants its lists in the file's order, from the pixels inwards, but upsample_type in running order.
    with torch.device("meta"):
        module = LTX2VideoDecoder3d(
            in_channels=vae["latent_channels"],
            out_channels=vae["out_channels"],
            block_out_channels=tuple(base * math.prod(multipliers[: i + 1]) for i in range(len(ups))),
            spatio_temporal_scaling=(True,) * len(ups),
            layers_per_block=tuple(block["num_layers"] for _, block in blocks),
            upsample_type=tuple(_UPSAMPLE_TYPES[kind] for kind, _ in reversed(ups)),
            patch_size=vae["patch_size"],
            is_causal=vae["causal_decoder"],
            inject_noise=tuple(block.get("inject_noise", False) for _, block in blocks),
            timestep_conditioning=knows_noise,
            upsample_residual=tuple(block.get("residual", False) for _, block in ups),
            upsample_factor=tuple(multipliers),
            spatial_padding_mode=vae.get("spatial_padding_mode", vae.get("decoder_spatial_padding_mode", default)),
        )
    return Blueprint(module, {f"vae.decoder.{_name_on_disk(name)}": name for name in module.state_dict()})


def video_encoder_blueprint(vae: dict[str, Any]) -> Blueprint:
    """Encoder of the `vae` section: residual blocks alternating with downsamplers; always causal."""
    blocks, downs = _alternating(vae["encoder_blocks"], _DOWNSAMPLE_TYPES, "encoder")
    channels = vae["latent_channels"]
    base = vae.get("encoder_base_channels", _PUBLISHED_BASE_CHANNELS)
    widths = [base * math.prod(block["multiplier"] for _, block in downs[: i + 1]) for i in range(len(downs))]
    padding = vae.get("spatial_padding_mode", vae.get("encoder_spatial_padding_mode", "zeros"))
    with torch.device("meta"):
        module = LTX2VideoEncoder3d(
            in_channels=vae["in_channels"],
            out_channels=base,
            block_out_channels=tuple(widths),
            down_block_types=("LTX2VideoDownBlock3D",) * len(downs),
            spatio_temporal_scaling=(True,) * len(downs),
            layers_per_block=tuple(block["num_layers"] for _, block in blocks),
            downsample_type=tuple(_DOWNSAMPLE_TYPES[kind] for kind, _ in downs),
            patch_size=vae["patch_size"],
            spatial_padding_mode=padding,
        )
        # The library takes the first block to be as wide as a latent, which only published sizes are.
        module.conv_out = LTX2VideoCausalConv3d(widths[-1], channels + 1, spatial_padding_mode=padding)
    return Blueprint(module, {f"vae.encoder.{_name_on_disk(name, len(downs))}": name for name in module.state_dict()})


def _alternating(blocks: list[Any], known: dict[str, str], what: str) -> tuple[list[Any], list[Any]]:
    """The residual blocks, and the resizing ones between them."""
    residual, resizing = blocks[::2], blocks[1::2]
    alternating = len(residual) == len(resizing) + 1 and all(kind == "res_x" for kind, _ in residual)
    if not alternating or any(kind not in known for kind, _ in resizing):
        raise UsageError(
            f"the checkpoint's video {what} must be blocks 'res_x' with one of {sorted(known)} between each two, got "
            f"{[kind for kind, _ in blocks]}; use a published model"
        )
    return residual, resizing


def _name_on_disk(name: str, num_downs: int = 0) -> str:
    # On disk all blocks are one list; the library splits it into a middle block and pairs with a resizing block. The
    # decoder's middle block comes first, the encoder's last.
    match = re.fullmatch(
        r"(mid_block|(?:up|down)_blocks\.\d+)\.(resnets|(?:up|down)samplers\.0|time_embedder)\.(.*)", name
    )
    if match is None:
        # The decoder's own embedding and table, after the last block.
        return re.sub(r"^(time_embedder\.|scale_shift_table)", r"last_\1", name)
    block, part, rest = match.groups()
    blocks, _, number = block.partition(".")
    resizes = part.endswith("samplers.0")
    if blocks == "mid_block":
        blocks, index = ("down_blocks", 2 * num_downs) if num_downs else ("up_blocks", 0)
    elif blocks == "down_blocks":
        index = 2 * int(number) + resizes
    else:
        index = 2 * int(number) + 2 - resizes
    part = "" if resizes else part.replace("resnets", "res_blocks") + "."
    return f"{blocks}.{index}.{part}{rest}"


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
