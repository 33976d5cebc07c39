"""Published single-file checkpoints: what is in them, and the streamed, strict way into a module.

A module is built on the meta device and its tensors come from the file one at a time, so that a second full copy never
exists. Weights stored as float8 with a scale are multiplied out, or kept for layers that compute in float8. Holds the
table from names in code to names on disk. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels.ops import OpSet
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.fitting import TensorSpec, differences, listed, scale_of
from pipeline.model.fp8 import Fp8Linear, use_fp8
from pipeline.model.hparams import DenoiserHparams, ExchangeTimesteps
from pipeline.model.pinned_reader import PinnedReader, Read, byte_offsets
from pipeline.model.share import Region

DENOISER_PREFIX = "model.diffusion_model."
# The text connectors live under the denoiser's prefix but are parts of the text path.
CONNECTOR_PREFIXES = (
    DENOISER_PREFIX + "video_embeddings_connector.",
    DENOISER_PREFIX + "audio_embeddings_connector.",
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Start of a name in code -> start of the name on disk; the rest of the name is the same but for _PARTS.
_DENOISER_NAMES = {
    "video.embed.": "patchify_proj.",
    "video.text_projection.": "caption_projection.",
    "video.adaln.": "adaln_single.",
    "video.prompt_adaln.": "prompt_adaln_single.",
    "video.keyframe_marker": "keyframes_abs_pos_embedding",
    "video.exchange_adaln.": "av_ca_video_scale_shift_adaln_single.",
    "video.exchange_gate_adaln.": "av_ca_a2v_gate_adaln_single.",
    "video.head_table": "scale_shift_table",
    "video.head.": "proj_out.",
    "audio.embed.": "audio_patchify_proj.",
    "audio.text_projection.": "audio_caption_projection.",
    "audio.adaln.": "audio_adaln_single.",
    "audio.prompt_adaln.": "audio_prompt_adaln_single.",
    "audio.exchange_adaln.": "av_ca_audio_scale_shift_adaln_single.",
    "audio.exchange_gate_adaln.": "av_ca_v2a_gate_adaln_single.",
    "audio.head_table": "audio_scale_shift_table",
    "audio.head.": "audio_proj_out.",
}
_BLOCK_NAMES = {
    "video.self_attention.": "attn1.",
    "video.text_attention.": "attn2.",
    "video.feed_forward.": "ff.",
    "video.table": "scale_shift_table",
    "video.text_table": "prompt_scale_shift_table",
    "audio.self_attention.": "audio_attn1.",
    "audio.text_attention.": "audio_attn2.",
    "audio.feed_forward.": "audio_ff.",
    "audio.table": "audio_scale_shift_table",
    "audio.text_table": "audio_prompt_scale_shift_table",
    "exchange.video_table": "scale_shift_table_a2v_ca_video",
    "exchange.audio_table": "scale_shift_table_a2v_ca_audio",
    "exchange.video_from_audio.": "audio_to_video_attn.",
    "exchange.audio_from_video.": "video_to_audio_attn.",
}
# Start of the part of a name within its module in code -> on disk.
_PARTS = {
    "embed_1.": "emb.timestep_embedder.linear_1.",
    "embed_2.": "emb.timestep_embedder.linear_2.",
    "rows.": "linear.",
    "widen.": "net.0.proj.",
    "narrow.": "net.2.",
    "to_out.": "to_out.0.",
}


class TensorFile:
    """An open `.safetensors` file. Only the header is read until a tensor is asked for.

    Raises UsageError if there is no such file, CheckpointMismatch if it is not a whole safetensors file. `what` names
    the file's part in messages.
    """

    def __init__(self, path: str | Path, what: str = "checkpoint") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{self.path}: {what} must be an existing file, got none; stage it or correct the path")
        try:
            self._file = safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            size_bytes = self.path.stat().st_size
            raise CheckpointMismatch(
                f"{self.path}: {what} must be a complete safetensors file, got {size_bytes} bytes that are not "
                f"({error}); fetch the file again and compare its hash"
            ) from error
        self._specs = self._read_specs()
        self._reader: PinnedReader | None = None

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, by its name on disk, in the order of the file. Reads no tensor data."""
        return dict(self._specs)

    def scale_of(self, name: str) -> str | None:
        """The name of the number that a float8 weight is to be multiplied with; None for any other tensor."""
        return scale_of(name, self._specs)

    def read(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, region: Region = ()
    ) -> Tensor:
        """One tensor, or a region of it, in memory of its own on `device`; floating tensors become `dtype` if given.

        A float8 weight with a scale is multiplied out in float32, exactly, and then becomes `dtype`, or bfloat16, which
        is what the rest of such a file is stored in. KeyError if there is no such tensor.
        """
        scale = self.scale_of(name)
        if scale is not None:
            weight = self.read_stored(name, device, region=region).float() * self.read_stored(scale, device).float()
            return weight.to(torch.bfloat16 if dtype is None else dtype)
        return self.read_stored(name, device, dtype, region)

    def read_stored(
        self, name: str, device: torch.device | str, dtype: torch.dtype | None = None, region: Region = ()
    ) -> Tensor:
        """As `read`, but the bare numbers on disk, whether or not a scale belongs to them."""
        if name not in self._specs:
            raise KeyError(f"{self.path} has no tensor {name}")
        spec = self._specs[name]
        target = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
        if torch.device(device).type == "cuda":
            return self._pinned_reader(device).read(name, spec, region).to(target)
        # What safetensors hands out on the CPU is a window on the mapped file: copy, so that the file may change later.
        tensor = self._file.get_slice(name)[region] if region else self._file.get_tensor(name)
        return tensor.to(device=device, dtype=target, copy=True)

    @contextmanager
    def reading_ahead(self, regions: Mapping[str, Region], device: torch.device | str) -> Iterator[None]:
        """Within, these tensors are on their way to a GPU before they are read, each with its scale if it has one.

        In another order, which should be the file's, or in other regions they come later.
        """
        if torch.device(device).type != "cuda":
            yield
            return
        reads = []
        for name, region in regions.items():
            reads.append(Read(name, self._specs[name], region))
            if scale := self.scale_of(name):
                reads.append(Read(scale, self._specs[scale]))
        with self._pinned_reader(device).reading_ahead(reads):
            yield
        self._reader = None  # its pinned memory serves the next file

    def _pinned_reader(self, device: torch.device | str) -> PinnedReader:
        if self._reader is None:
            self._reader = PinnedReader(self.path, device)
        return self._reader

    def _read_specs(self) -> dict[str, TensorSpec]:
        specs = {}
        for name in byte_offsets(self.path):
            header = self._file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise CheckpointMismatch(
                    f"{self.path}: {name} must have one of the dtypes {sorted(_DTYPES)}, got {header.get_dtype()}; "
                    "not supported yet"
                )
            specs[name] = TensorSpec(tuple(header.get_shape()), _DTYPES[header.get_dtype()])
        return specs


class CheckpointFile(TensorFile):
    """A published single-file checkpoint: tensors, and the model's configuration in the metadata under `config`.

    Raises CheckpointMismatch if there is no such configuration.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config = self._read_config()

    def _read_config(self) -> dict[str, Any]:
        metadata = self._file.metadata() or {}
        wrong = f"{self.path}: checkpoint metadata must hold the model configuration as a JSON object under 'config'"
        way_out = "use a published single-file checkpoint, not a converted or stripped one"
        if "config" not in metadata:
            raise CheckpointMismatch(f"{wrong}, got only {sorted(metadata)}; {way_out}")
        try:
            config = json.loads(metadata["config"])
        except json.JSONDecodeError as error:
            raise CheckpointMismatch(f"{wrong}, got text that is not JSON ({error}); {way_out}") from error
        if not isinstance(config, dict):
            raise CheckpointMismatch(f"{wrong}, got a {type(config).__name__}; {way_out}")
        return config


class Sharding(Protocol):
    """How a denoiser is cut that several devices compute together, and what of it belongs on this one."""

    def fit(self, denoiser: AudioVideoDenoiser, ops: OpSet) -> None:
        """Make a denoiser without values compute its share. Names stay, and shapes are still those of the whole.

        UsageError if a denoiser of these sizes cannot be cut so.
        """

    def region(self, place: str, shape: Sequence[int]) -> Region:
        """What of the tensor of this name in code belongs here; `shape` is that of the whole."""


def load_denoiser(
    checkpoint: CheckpointFile,
    ops: OpSet,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    exchange_timesteps: ExchangeTimesteps = "1.2.0",
    fp8_blocks: Container[int] = (),
    sharding: Sharding | None = None,
) -> AudioVideoDenoiser:
    """The checkpoint's denoiser on `device`, in evaluation mode, without gradients.

    `dtype` None keeps each tensor as stored. Blocks in `fp8_blocks` (counted from 0) get float8 linear layers,
    quantised tensor by tensor on the way in; published float8 weights are taken over as they are. With a `sharding`
    only this device's share is read, and every device of it must load at the same time. Raises one CheckpointMismatch
    for metadata of another kind of model, or listing every tensor that is missing, unexpected or of the wrong shape or
    kind.
    """
    hparams = replace(read_hparams(checkpoint), exchange_timesteps=exchange_timesteps)
    denoiser = build_on_meta(hparams, ops)
    use_fp8(denoiser, fp8_blocks, ops)
    if sharding is not None:
        sharding.fit(denoiser, ops)
    names = denoiser_names(denoiser.state_dict(), tensors_to_place(checkpoint.tensor_specs()))
    fill_module(denoiser, checkpoint, names, device=device, dtype=dtype, what="the denoiser", sharding=sharding)
    return denoiser.eval()


def read_hparams(checkpoint: CheckpointFile) -> DenoiserHparams:
    """The denoiser's hyper-parameters; CheckpointMismatch if the metadata describes a model we do not have."""
    source = f"{checkpoint.path}: metadata config"
    transformer = checkpoint.config.get("transformer")
    if not isinstance(transformer, dict):
        raise CheckpointMismatch(
            f"{source} must have a section 'transformer', got {sorted(checkpoint.config)}; use a file with a denoiser"
        )
    return DenoiserHparams.from_config(
        transformer, has_audio=has_audio_stream(denoiser_tensors(checkpoint.tensor_specs())), source=source
    )


def build_on_meta(hparams: DenoiserHparams, ops: OpSet) -> AudioVideoDenoiser:
    """The denoiser with shapes only: takes no memory, holds no values."""
    with torch.device("meta"):
        return AudioVideoDenoiser(hparams, ops)


def denoiser_tensors(names_on_disk: Iterable[str]) -> list[str]:
    """Those names on disk that belong to the denoiser itself."""
    return [
        name for name in names_on_disk if name.startswith(DENOISER_PREFIX) and not name.startswith(CONNECTOR_PREFIXES)
    ]


def tensors_to_place(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The denoiser's own tensors but for the scales of float8 weights, which come with these.

    A weight's `input_scale` is for activations quantised by one number known in advance, which nothing here does.
    """
    owned = denoiser_tensors(specs)
    weights = [name for name in owned if scale_of(name, specs) is not None]
    scales = {name.removesuffix("weight") + kind for name in weights for kind in ("weight_scale", "input_scale")}
    return [name for name in owned if name not in scales]


def has_audio_stream(denoiser_tensors_on_disk: Iterable[str]) -> bool:
    """If the denoiser has an audio stream. Files of the video-only kind carry the same metadata, so tensors decide."""
    return any("audio_" in name or ".av_ca_" in name for name in denoiser_tensors_on_disk)


def denoiser_names(places: Iterable[str], owned: Iterable[str]) -> dict[str, str]:
    """Names on disk to names in code, for `fill_module`: all `places` of the denoiser and all that the file has."""
    names = {name_on_disk(place): place for place in places}
    return names | {stored: stored for stored in owned if stored not in names}


def name_on_disk(name_in_code: str) -> str:
    """Where a published checkpoint keeps the denoiser's tensor of this name."""
    block = re.match(r"blocks\.(\d+)\.", name_in_code)
    table, within = (_BLOCK_NAMES, name_in_code[block.end() :]) if block else (_DENOISER_NAMES, name_in_code)
    start = f"transformer_blocks.{block.group(1)}." if block else ""
    module = next(prefix for prefix in table if within.startswith(prefix))
    part = within.removeprefix(module)
    for in_code, on_disk in _PARTS.items():
        if part.startswith(in_code):
            part = on_disk + part.removeprefix(in_code)
            break
    return DENOISER_PREFIX + start + table[module] + part


def fill_module(
    module: nn.Module,
    checkpoint: CheckpointFile,
    names: Mapping[str, str],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    what: str,
    sharding: Sharding | None = None,
) -> None:
    """Give `module` (built on the meta device) its tensors, one at a time in the file's order, straight to `device`.

    `names` maps every tensor name on disk that belongs to this part to its state_dict name in the module; a tensor
    that has no place there maps to any name the module lacks. `what` names the part in messages. Parameters are set
    without gradient. Raises one CheckpointMismatch, before anything is read, that lists every tensor of the module
    without a source, every source without a place, and every wrong shape or kind of number.
    """
    problems = differences(_places(module), checkpoint.tensor_specs(), names)
    if problems:
        headline = (
            f"{checkpoint.path}: tensors of {what} must be exactly those of the model its metadata describes, got "
            f"{len(problems)} differences; use the published file of this model"
        )
        raise CheckpointMismatch(listed(headline, problems))
    regions = {
        stored: region_of(stored, names[stored], checkpoint, sharding)
        for stored in checkpoint.tensor_specs()
        if stored in names
    }
    with checkpoint.reading_ahead(regions, device):
        for stored, region in regions.items():
            fill_place(module, names[stored], checkpoint, stored, device, dtype, region)


def region_of(stored: str, place: str, source: TensorFile, sharding: Sharding | None) -> Region:
    """What of the stored tensor belongs at its place on this device."""
    return () if sharding is None else sharding.region(place, source.tensor_specs()[stored].shape)


def fill_place(
    module: nn.Module,
    place: str,
    source: TensorFile,
    stored: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
    region: Region = (),
) -> None:
    """Give one tensor of `module` its value from the file, as `fill_module` does."""
    owner = module.get_submodule(place.rpartition(".")[0])
    scale = source.scale_of(stored)
    if isinstance(owner, Fp8Linear) and place.endswith(".weight") and scale is not None:
        weight = source.read_stored(stored, device, region=region)
        owner.set_scaled_weight(weight, source.read_stored(scale, device))
    else:
        set_tensor(module, place, source.read(stored, device, dtype, region))


def set_tensor(module: nn.Module, place: str, tensor: Tensor) -> None:
    """Put a tensor at a name of the module's; float8 layers quantise it."""
    owner_name, _, leaf = place.rpartition(".")
    owner = module.get_submodule(owner_name)
    if isinstance(owner, Fp8Linear) and leaf == "weight":
        owner.set_weight(tensor)
    elif leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _places(module: nn.Module) -> dict[str, Tensor]:
    """What has to come from the file: the state dict, and any other buffer that has no values yet."""
    saved = module.state_dict().keys()
    return {name: tensor for name, tensor in _all_tensors(module) if name in saved or tensor.is_meta}


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
