"""The loading of a model: files on disk to one `RenderEngine`.

What the parts are made of is in the components and in `pipeline/model`; what they do for a clip is in `engine.py`.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from kernels.ops import OpSet, reference_ops
from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.engine.components.audio_vae import load_audio_decoder
from pipeline.engine.components.connectors import load_text_connectors
from pipeline.engine.components.parts import tensors_of_parts
from pipeline.engine.components.text_encoder import load_text_encoder
from pipeline.engine.components.upsampler import load_latent_upsampler
from pipeline.engine.components.video_vae import load_video_decoder, load_video_encoder
from pipeline.engine.components.vocoder import load_vocoder
from pipeline.engine.engine import DENOISER, VIDEO_DECODER, RenderEngine
from pipeline.engine.memory import PHASES, MemoryPlan, Part, plan_for_most
from pipeline.engine.residency import Residency
from pipeline.engine.shortcuts import Shortcuts, SparseSettings
from pipeline.engine.step_cache import StepCache
from pipeline.engine.text import TEXT_ENCODER, TextConditioner
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.adapters import FusedAdapters
from pipeline.model.checkpoint import (
    CheckpointFile,
    Sharding,
    build_on_meta,
    denoiser_names,
    denoiser_tensors,
    load_denoiser,
    name_on_disk,
    read_hparams,
    region_of,
)
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.dtypes import require_usable_dtypes
from pipeline.model.hparams import ExchangeTimesteps
from pipeline.model.sparse_attention import use_sparse_attention

log = logging.getLogger("pipeline.engine")

_DTYPES: dict[str, torch.dtype | None] = {
    "checkpoint": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
# Of a text encoder's numbers. Quantised tensors are of a class of their own, which cannot be lent.
WHOLE_BITS = 16
# GPUs from here on multiply 8-bit numbers (Ada, Hopper).
FP8_CAPABILITY = (8, 9)
# What attention over blocks was measured on, and the channels of a head that it was tried with there.
SPARSE_CAPABILITY = (9, 0)
SPARSE_HEAD_CHANNELS = (64, 128)
# The audio encoder is not loaded yet; published files may also carry statistics that no released code reads.
_KNOWN_AND_UNUSED = re.compile(
    r"audio_vae\.encoder\..+"
    r"|vae\.per_channel_statistics\.(channel|mean-of-stds|mean-of-stds_over_std-of-means)"
)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that the device offers, and that each phase of the clips to come needs beside weights, largest first."""

    limit_bytes: int
    demands: Sequence[Mapping[str, int]]


def load_engine(
    model: ModelConfig,
    precision: PrecisionConfig,
    *,
    device: str,
    ops: OpSet,
    budget: MemoryBudget | None = None,
    sharding: Sharding | None = None,
) -> RenderEngine:
    """Every part of `model` on `device`, and the calling thread's number of torch threads set.

    Under a `budget`, parts that do not fit beside the others wait on the host between uses. With a `sharding` the
    denoiser is a share of one that several engines, loaded and used alike, compute together. Raises UsageError or
    CheckpointMismatch, before weights are read where the headers show it, if a file is missing, is of another kind, or
    disagrees with `model.size`; OutOfMemory if the budget cannot be met.
    """
    started = time.monotonic()
    configure_torch(precision)
    folder, dtype = Path(model.folder), _DTYPES[precision.dtype]
    checkpoint = _open_checkpoint(model, precision, device)
    upscaler = CheckpointFile(folder / model.spatial_upscaler) if model.spatial_upscaler else None

    plan = None if budget is None else _plan(model, precision, checkpoint, budget, sharding)
    residency = Residency(device, () if plan is None else plan.on_host)

    encoder = load_text_encoder(
        folder / model.text_encoder,
        max_tokens=model.size.text_tokens,
        device=device,
        dtype=dtype,
        bits=precision.text_encoder_bits,
    )
    if precision.text_encoder_bits == WHOLE_BITS:
        residency.keep(TEXT_ENCODER, encoder.module)
    text_loaded = time.monotonic()
    connectors = load_text_connectors(checkpoint, device=device, dtype=dtype)
    video_decoder = load_video_decoder(checkpoint, device=device, dtype=dtype, ops=ops)
    upsampler = None
    if upscaler is not None:
        upsampler = load_latent_upsampler(upscaler, video_decoder.statistics, device=device, dtype=dtype)
    denoiser = _load_denoiser(model, precision, checkpoint, device, ops, sharding)
    residency.keep(VIDEO_DECODER, video_decoder.module)
    residency.keep(DENOISER, denoiser)
    engine = RenderEngine(
        text=TextConditioner(encoder, connectors, device=device, residency=residency),
        denoiser=denoiser,
        fused=FusedAdapters(denoiser, checkpoint, dtype, sharding),
        adapter_files={name: str(folder / file) for name, file in model.extras().items()},
        upsampler=upsampler,
        video_encoder=load_video_encoder(checkpoint, device=device, dtype=dtype),
        video_decoder=video_decoder,
        audio_decoder=load_audio_decoder(checkpoint, device=device, dtype=dtype) if model.size.has_audio else None,
        vocoder=load_vocoder(checkpoint, device=device) if model.size.has_audio else None,
        device=device,
        residency=residency,
        shortcuts=_shortcuts(model, precision, denoiser, ops),
    )
    _log_loaded(model, device, plan, text_encoder_s=text_loaded - started, load_s=time.monotonic() - started)
    return engine


def _open_checkpoint(model: ModelConfig, precision: PrecisionConfig, device: str) -> CheckpointFile:
    """The model's checkpoint, found by its header to be what the settings say of it."""
    checkpoint = CheckpointFile(Path(model.folder) / model.checkpoint)
    _require_size(model, checkpoint)
    require_usable_dtypes(checkpoint.path, checkpoint.tensor_specs())
    _require_all_tensors_known(checkpoint)
    _require_tier_possible(model, precision, checkpoint, device)
    return checkpoint


def _load_denoiser(
    model: ModelConfig,
    precision: PrecisionConfig,
    checkpoint: CheckpointFile,
    device: str,
    ops: OpSet,
    sharding: Sharding | None,
) -> AudioVideoDenoiser:
    return load_denoiser(
        checkpoint,
        ops,
        device,
        _DTYPES[precision.dtype],
        # The settings know no other rules than the model does (`EXCHANGE_TIMESTEPS`).
        exchange_timesteps=cast(ExchangeTimesteps, model.exchange_timesteps),
        fp8_blocks=_fp8_blocks(precision, model),
        sharding=sharding,
    )


def configure_torch(precision: PrecisionConfig) -> None:
    """Threads and roundings of this process, as every engine has them."""
    torch.set_num_threads(precision.torch_threads)
    # The vocoder runs in float32 always; TensorFloat-32 would round its convolutions' inputs to 10 bits.
    torch.backends.cudnn.allow_tf32 = False


def _log_loaded(model: ModelConfig, device: str, plan: MemoryPlan | None, **seconds: float) -> None:
    facts = {
        "model": model.name,
        "device": device,
        **seconds,
        "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "waiting_on_host": [] if plan is None else sorted(plan.on_host),
        "planned_peak_bytes": {} if plan is None else dict(plan.peak_bytes),
    }
    log.info("engine loaded", extra={"facts": facts})


def _fp8_blocks(precision: PrecisionConfig, model: ModelConfig) -> range:
    if precision.linear != "fp8":
        return range(0)
    return range(precision.keep_first_blocks, model.size.num_layers - precision.keep_last_blocks)


def _sparse_layers(precision: PrecisionConfig, model: ModelConfig) -> range:
    if precision.attention != "block_sparse":
        return range(0)
    return range(precision.dense_first_layers, model.size.num_layers - precision.dense_last_layers)


def _shortcuts(model: ModelConfig, precision: PrecisionConfig, denoiser: AudioVideoDenoiser, ops: OpSet) -> Shortcuts:
    layers, sparse = _sparse_layers(precision, model), None
    if layers:
        sparse = SparseSettings(
            use_sparse_attention(denoiser, layers, ops),
            precision.attention_density,
            precision.dense_below_tokens,
            precision.dense_above_level,
        )
    threshold = precision.step_cache_threshold
    return Shortcuts(sparse, partial(StepCache, threshold, ops) if threshold else None)


def _plan(
    model: ModelConfig,
    precision: PrecisionConfig,
    checkpoint: CheckpointFile,
    budget: MemoryBudget,
    sharding: Sharding | None,
) -> MemoryPlan:
    """Weights as the headers tell them, in the numbers they will be held in."""
    wanted = _DTYPES[precision.dtype]
    specs = checkpoint.tensor_specs()
    sizes = {
        # Float8 files are widened to 16 bits unless the tier computes in float8.
        name: math.prod(shape) * max(2, (wanted or specs[name].dtype).itemsize)
        for name, shape in _shapes_here(checkpoint, sharding).items()
    }
    ours = set(denoiser_tensors(sizes))
    decoder = {name for name in sizes if name.startswith("vae.decoder.")}
    denoiser_bytes = sum(sizes[name] for name in ours)
    # Nearly all of a block's bytes are linear weights, which take one byte instead of two.
    denoiser_bytes -= denoiser_bytes * len(_fp8_blocks(precision, model)) // (2 * model.size.num_layers)
    folder = Path(model.folder)
    encoder_bytes = sum(path.stat().st_size for path in (folder / model.text_encoder).rglob("*.safetensors"))
    rest_bytes = sum(size for name, size in sizes.items() if name not in ours | decoder)
    if model.spatial_upscaler:
        rest_bytes += (folder / model.spatial_upscaler).stat().st_size
    bits = precision.text_encoder_bits
    parts = [
        Part(DENOISER, denoiser_bytes, frozenset({"denoise"})),
        Part(VIDEO_DECODER, sum(sizes[name] for name in decoder), frozenset({"decode"})),
        Part(TEXT_ENCODER, encoder_bytes * bits // WHOLE_BITS, frozenset({"text_encode"}), can_wait=bits == WHOLE_BITS),
        Part("rest", rest_bytes, frozenset(PHASES), can_wait=False),
    ]
    return plan_for_most(parts, budget.demands, budget.limit_bytes)


def _shapes_here(checkpoint: CheckpointFile, sharding: Sharding | None) -> dict[str, tuple[int, ...]]:
    """Of what this device will hold, by the name on disk."""
    shapes = {name: spec.shape for name, spec in checkpoint.tensor_specs().items()}
    if sharding is not None:
        places = build_on_meta(read_hparams(checkpoint), reference_ops()).state_dict()
        for stored, place in denoiser_names(places, ()).items():
            # What is missing is said where the denoiser is loaded.
            if stored in shapes:
                whole = torch.empty(shapes[stored], device="meta")
                shapes[stored] = tuple(whole[region_of(stored, place, checkpoint, sharding)].shape)
    return shapes


def _require_size(model: ModelConfig, checkpoint: CheckpointFile) -> None:
    hparams = read_hparams(checkpoint)
    if hparams.family != model.family:
        raise UsageError(
            f"model.family must be {hparams.family}, got {model.family}: {checkpoint.path} says so; use the model's "
            "own YAML"
        )
    stored = {
        "num_layers": hparams.num_layers,
        "video_width": hparams.video.width,
        "audio_width": 0 if hparams.audio is None else hparams.audio.width,
        "num_heads": hparams.video.num_heads,
        **({} if hparams.audio is None else {"num_audio_heads": hparams.audio.num_heads}),
    }
    wrong = [
        f"model.size.{name} must be {value}, got {getattr(model.size, name)}"
        for name, value in stored.items()
        if getattr(model.size, name) != value
    ]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)}: {checkpoint.path} says so; correct conf/model/{model.name}.yaml")


def _require_tier_possible(
    model: ModelConfig, precision: PrecisionConfig, checkpoint: CheckpointFile, device: str
) -> None:
    _require_fp8_possible(model, precision, checkpoint, device)
    _require_sparse_possible(model, precision, checkpoint, device)


def _require_fp8_possible(
    model: ModelConfig, precision: PrecisionConfig, checkpoint: CheckpointFile, device: str
) -> None:
    """UsageError where precision.linear=fp8 would change nothing, or fail at the first product."""
    if precision.linear != "fp8":
        return
    if not _fp8_blocks(precision, model):
        raise UsageError(
            f"precision.keep_first_blocks and keep_last_blocks must leave one of the {model.size.num_layers} blocks of "
            f"{model.name} to fp8, got {precision.keep_first_blocks} and {precision.keep_last_blocks}; use smaller "
            "ones or precision=exact"
        )
    if torch.device(device).type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise UsageError(
            f"precision.linear must be exact on a GPU below compute capability 8.9, got fp8 on one of "
            f"{capability[0]}.{capability[1]}; use precision=exact"
        )
    _require_bfloat16_stream(precision, checkpoint, "fp8")


def _require_bfloat16_stream(precision: PrecisionConfig, checkpoint: CheckpointFile, what: str) -> None:
    # The stream is of the numbers of the layer that embeds its tokens.
    spec = checkpoint.tensor_specs().get(name_on_disk("video.embed.weight"))
    dtype = _DTYPES[precision.dtype] or (None if spec is None else spec.dtype)
    if dtype not in (None, torch.bfloat16):
        raise UsageError(
            f"precision.dtype must be bfloat16 with {what} on a GPU, got {precision.dtype} with weights of {dtype} in "
            f"{checkpoint.path}; use precision.dtype=bfloat16"
        )


def _require_sparse_possible(
    model: ModelConfig, precision: PrecisionConfig, checkpoint: CheckpointFile, device: str
) -> None:
    """UsageError where precision.attention=block_sparse would change nothing, or fail at the first sparse step."""
    if precision.attention != "block_sparse":
        return
    if not _sparse_layers(precision, model):
        raise UsageError(
            f"precision.dense_first_layers and dense_last_layers must leave one of the {model.size.num_layers} layers "
            f"of {model.name} to block_sparse, got {precision.dense_first_layers} and {precision.dense_last_layers}; "
            "use smaller ones or precision.attention=exact"
        )
    if torch.device(device).type != "cuda":
        return
    way_out = "use precision.attention=exact"
    capability = torch.cuda.get_device_capability(device)
    if capability != SPARSE_CAPABILITY:
        found = ".".join(map(str, capability))
        raise UsageError(
            f"precision.attention must be exact on a GPU that is not of compute capability 9.0, got block_sparse on "
            f"one of {found}; {way_out}"
        )
    video = read_hparams(checkpoint).video
    channels = video.width // video.num_heads
    if channels not in SPARSE_HEAD_CHANNELS:
        raise UsageError(
            f"precision.attention must be exact on a GPU for heads of other than {SPARSE_HEAD_CHANNELS} channels, got "
            f"block_sparse for {channels}; {way_out}"
        )
    _require_bfloat16_stream(precision, checkpoint, "block_sparse")


def _require_all_tensors_known(checkpoint: CheckpointFile) -> None:
    """The denoiser accounts for its own tensors and every part for its missing ones; this finds what nobody owns."""
    names = checkpoint.tensor_specs()
    known = set(denoiser_tensors(names)) | tensors_of_parts(checkpoint.config)
    unknown = sorted(name for name in names if name not in known and not _KNOWN_AND_UNUSED.fullmatch(name))
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointMismatch(f"{checkpoint.path} holds {len(unknown)} tensors that no part owns: {shown}")
