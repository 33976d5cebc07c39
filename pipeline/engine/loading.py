"""The loading of a model: files on disk to one `RenderEngine`.

What the parts are made of is in the components and in `pipeline/model`; what they do for a clip is in `engine.py`.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import cast

import torch

from kernels.ops import OpSet
from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.engine.components.audio_vae import load_audio_decoder
from pipeline.engine.components.connectors import load_text_connectors
from pipeline.engine.components.parts import tensors_of_parts
from pipeline.engine.components.text_encoder import load_text_encoder
from pipeline.engine.components.upsampler import load_latent_upsampler
from pipeline.engine.components.video_vae import load_video_decoder, load_video_encoder
from pipeline.engine.components.vocoder import load_vocoder
from pipeline.engine.engine import RenderEngine
from pipeline.engine.text import TextConditioner
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import CheckpointFile, denoiser_tensors, load_denoiser, read_hparams
from pipeline.model.dtypes import require_usable_dtypes
from pipeline.model.hparams import ExchangeTimesteps

log = logging.getLogger("pipeline.engine")

_DTYPES: dict[str, torch.dtype | None] = {
    "checkpoint": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
# The audio encoder is not loaded yet; published files may also carry statistics that no released code reads.
_KNOWN_AND_UNUSED = re.compile(
    r"audio_vae\.encoder\..+"
    r"|vae\.per_channel_statistics\.(channel|mean-of-stds|mean-of-stds_over_std-of-means)"
)


def load_engine(model: ModelConfig, precision: PrecisionConfig, *, device: str, ops: OpSet) -> RenderEngine:
    """Every part of `model` on `device`, and the calling thread's number of torch threads set.

    Raises UsageError or CheckpointMismatch, before weights are read where the headers show it, if a file is missing,
    is of another kind, or disagrees with `model.size`.
    """
    started = time.monotonic()
    torch.set_num_threads(precision.torch_threads)
    # The vocoder runs in float32 always; TensorFloat-32 would round its convolutions' inputs to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    folder, dtype = Path(model.folder), _DTYPES[precision.dtype]
    checkpoint = CheckpointFile(folder / model.checkpoint)
    _require_size(model, checkpoint)
    require_usable_dtypes(checkpoint.path, checkpoint.tensor_specs())
    _require_all_tensors_known(checkpoint)
    upscaler = CheckpointFile(folder / model.spatial_upscaler) if model.spatial_upscaler else None

    encoder = load_text_encoder(
        folder / model.text_encoder, max_tokens=model.size.text_tokens, device=device, dtype=dtype
    )
    text_loaded = time.monotonic()
    connectors = load_text_connectors(checkpoint, device=device, dtype=dtype)
    video_decoder = load_video_decoder(checkpoint, device=device, dtype=dtype)
    upsampler = None
    if upscaler is not None:
        upsampler = load_latent_upsampler(upscaler, video_decoder.statistics, device=device, dtype=dtype)
    # The settings know no other rules than the model does (`EXCHANGE_TIMESTEPS`).
    rule = cast(ExchangeTimesteps, model.exchange_timesteps)
    denoiser = load_denoiser(checkpoint, ops, device, dtype, exchange_timesteps=rule)
    has_audio = denoiser.hparams.audio is not None
    engine = RenderEngine(
        text=TextConditioner(encoder, connectors),
        denoiser=denoiser,
        fused=FusedAdapters(denoiser, checkpoint, dtype),
        adapter_files={name: str(folder / file) for name, file in model.extras().items()},
        upsampler=upsampler,
        video_encoder=load_video_encoder(checkpoint, device=device, dtype=dtype),
        video_decoder=video_decoder,
        audio_decoder=load_audio_decoder(checkpoint, device=device, dtype=dtype) if has_audio else None,
        vocoder=load_vocoder(checkpoint, device=device) if has_audio else None,
        device=device,
    )
    seconds = {"text_encoder_s": text_loaded - started, "load_s": time.monotonic() - started}
    log.info("engine loaded", extra={"facts": {"model": model.name, "device": device, **seconds}})
    return engine


def _require_size(model: ModelConfig, checkpoint: CheckpointFile) -> None:
    hparams = read_hparams(checkpoint)
    stored = {
        "num_layers": hparams.num_layers,
        "video_width": hparams.video.width,
        "audio_width": 0 if hparams.audio is None else hparams.audio.width,
    }
    wrong = [
        f"model.size.{name} must be {value}, got {getattr(model.size, name)}"
        for name, value in stored.items()
        if getattr(model.size, name) != value
    ]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}: {checkpoint.path} says so; correct conf/model/{model.name}.yaml")


def _require_all_tensors_known(checkpoint: CheckpointFile) -> None:
    """The denoiser accounts for its own tensors and every part for its missing ones; this finds what nobody owns."""
    names = checkpoint.tensor_specs()
    known = set(denoiser_tensors(names)) | tensors_of_parts(checkpoint.config)
    unknown = sorted(name for name in names if name not in known and not _KNOWN_AND_UNUSED.fullmatch(name))
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointMismatch(f"{checkpoint.path} holds {len(unknown)} tensors that no part owns: {shown}")
