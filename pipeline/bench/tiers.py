"""Our contestants: the denoiser in each tier, and without one group of kernels at a time. To add a tier, add a line.

All have the same random weights and share what tensors they can, so that their outputs can be compared and all fit one
GPU beside each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.ops import OpSet, device_ops, fused_ops, reference_ops, with_block_sparse_attention
from kernels.rows import Modulation
from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.engine.latents import audio_positions, video_positions
from pipeline.engine.random_weights import random_value
from pipeline.engine.shortcuts import NO_SHORTCUTS, Shortcuts, SparseSettings
from pipeline.geometry import LatentShape
from pipeline.model.checkpoint import Sharding, build_on_meta, name_on_disk, set_tensor
from pipeline.model.denoiser import AudioVideoDenoiser, Denoiser
from pipeline.model.fp8 import Fp8Linear, use_fp8
from pipeline.model.graphs import GraphedDenoiser
from pipeline.model.hparams import DenoiserHparams, StreamHparams
from pipeline.model.sparse_attention import use_sparse_attention
from pipeline.model.streams import DistinctTimesteps, TokenStream
from pipeline.planning.sparsity import mean_of_layers

SEED = 20261120
# A noise level in the middle of the published schedules.
SIGMA = 0.9
# The tiers of conf/precision; a test holds them to it.
EXACT = PrecisionConfig()
FP8 = PrecisionConfig("fp8", linear="fp8")
FAST = PrecisionConfig(
    "fast", linear="fp8", keep_first_blocks=1, keep_last_blocks=1, attention="block_sparse", dense_above_level=0.99,
    dense_first_layers=1, dense_last_layers=1,
)  # fmt: skip
Velocities = tuple[Tensor | None, Tensor | None]
Step = Callable[[], Velocities]


@dataclass(frozen=True, eq=False)
class Case:
    """What is denoised: random tokens and text of one clip, without guidance."""

    shape: LatentShape
    video: TokenStream
    audio: TokenStream | None


class Built(NamedTuple):
    """A contestant with its weights on the device. `bind` makes one step of a case, all that outlasts it prepared.

    `attended` is the part of the video's self-attention that the step computes, the mean of all layers; `facts` are
    what else is known after two steps; `shortcuts` are what an engine of this contestant leaves out of steps.
    """

    module: nn.Module
    bind: Callable[[Case], Step]
    attended: Callable[[Case], float] = lambda case: 1.0
    facts: Callable[[], dict[str, Any]] = dict
    shortcuts: Shortcuts = NO_SHORTCUTS


class Weights:
    """Random numbers for the denoiser of a `transformer` section, in bfloat16 and in float8.

    With a `sharding` this device's share of them: each tensor is drawn whole, so that the numbers are those of one
    device, and cut before the next one is. Then building a denoiser is collective.
    """

    def __init__(
        self, section: Mapping[str, Any], model: ModelConfig, device: str, sharding: Sharding | None = None
    ) -> None:
        self.section, self.device, self._sharding = section, device, sharding
        self.hparams = DenoiserHparams.from_config(section, has_audio=model.size.has_audio)
        self.num_text_tokens = model.size.text_tokens
        # Float8 numbers and scales of the layers that some denoiser has in them.
        self._in_float8: dict[str, tuple[Tensor, Tensor]] = {}
        self.plain = self._on_meta((), device_ops(device))
        generator = torch.Generator(device).manual_seed(SEED)
        for name, tensor in list(self.plain.named_parameters()):
            shape = tuple(tensor.shape)
            value = random_value(name_on_disk(name), shape, "BF16", {}, generator).to(device)
            if sharding is not None:
                value = value[sharding.region(name, shape)].clone(memory_format=torch.contiguous_format)
            set_tensor(self.plain, name, value)

    def _on_meta(self, fp8_blocks: Container[int], ops: OpSet) -> AudioVideoDenoiser:
        """A denoiser without values, or one that computes this device's share."""
        denoiser = build_on_meta(self.hparams, ops)
        use_fp8(denoiser, fp8_blocks, ops)
        if self._sharding is not None:
            self._sharding.fit(denoiser, ops)
        return denoiser

    def layers_between(self, num_first: int, num_last: int) -> range:
        """All layers but so many at the start and at the end, of which a toy keeps fewer."""
        num_layers = self.hparams.num_layers
        most = (num_layers - 1) // 2
        return range(min(num_first, most), num_layers - min(num_last, most))

    def denoiser(self, ops: OpSet, precision: PrecisionConfig = EXACT) -> AudioVideoDenoiser:
        """A denoiser of these weights with other operations, its layers in the numbers of a tier."""
        blocks = range(0)
        if precision.linear == "fp8":
            blocks = self.layers_between(precision.keep_first_blocks, precision.keep_last_blocks)
        denoiser = self._on_meta(blocks, ops)
        for name, tensor in self.plain.named_parameters():
            owner = denoiser.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Fp8Linear) and name in self._in_float8:
                owner.set_scaled_weight(*self._in_float8[name])
                continue
            set_tensor(denoiser, name, tensor.data)
            if isinstance(owner, Fp8Linear) and owner.weight_scale is not None and name.endswith(".weight"):
                self._in_float8[name] = owner.weight.data, owner.weight_scale
        return denoiser.eval()

    def case(self, shape: LatentShape) -> Case:
        """The same tokens at every call."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        sigma_B = torch.full((1,), SIGMA, device=self.device)

        def stream(hparams: StreamHparams, num_tokens: int, positions_BAT2: Tensor) -> TokenStream:
            sizes = ((num_tokens, hparams.in_channels), (self.num_text_tokens, text_channels(self.hparams, hparams)))
            tokens_BTC, text_BSD = (
                torch.randn(1, *size, device=self.device, dtype=torch.bfloat16, generator=generator) for size in sizes
            )
            return TokenStream(tokens_BTC, DistinctTimesteps.uniform(sigma_B), sigma_B, positions_BAT2, text_BSD)

        video = stream(self.hparams.video, shape.num_video_tokens, video_positions(shape, device=self.device))
        audio = None
        if self.hparams.audio is not None:
            positions_BAT2 = audio_positions(shape, device=self.device)
            audio = stream(self.hparams.audio, shape.num_audio_latents, positions_BAT2)
        return Case(shape, video, audio)


def text_channels(hparams: DenoiserHparams, stream: StreamHparams) -> int:
    """Of the text embeddings that a stream is given."""
    return hparams.text_channels or stream.width


# Relative L2 error of a velocity against the plain operations that a contestant may have. On an H200, over 48 layers,
# other roundings to bfloat16 gave 0.012 and float8 products 0.056 (tests/bench/results/kernels.jsonl). Of leaving keys
# out nobody has measured it there: on random weights attention is nearly even, a choice of keys is no better than
# chance, and the bound only tells what is roughly right from tokens in a wrong order, which are off by 1.4. What the
# choice costs is for the structured heads to say (`attention.py`).
_BOUND, _FLOAT8_BOUND, _SPARSE_BOUND = 0.05, 0.15, 0.5


class Contestant(NamedTuple):
    """Who takes part: `in_float8` if some of its products run on float8 numbers, `bound` how far off it may be."""

    name: str
    in_float8: bool
    build: Callable[[Weights], Built]
    bound: float = _BOUND


SpreadFn = Callable[[AudioVideoDenoiser, OpSet], Denoiser]
"""What a denoiser with these operations is called through on one rank of several: it may be taken over for that."""


def on_one(denoiser: AudioVideoDenoiser, ops: OpSet) -> Denoiser:
    """The `SpreadFn` of one device alone."""
    return denoiser


def tier(
    name: str,
    ops: Callable[[str], OpSet],
    *,
    precision: PrecisionConfig = EXACT,
    keeps_text: bool = True,
    beside: bool = True,
    spread: SpreadFn = on_one,
) -> Contestant:
    """Our denoiser with the operations that `ops` has for a kind of device; with `beside`, audio beside the video."""

    def build(weights: Weights) -> Built:
        made = ops(weights.device)
        denoiser = weights.denoiser(made, precision)
        if beside:
            _overlap_audio(denoiser, weights)
        return Built(denoiser, partial(_bound, spread(denoiser, made), keeps_text))

    return _contestant(name, precision, build)


def _contestant(name: str, precision: PrecisionConfig, build: Callable[[Weights], Built]) -> Contestant:
    in_float8 = precision.linear == "fp8"
    return Contestant(name, in_float8, build, _FLOAT8_BOUND if in_float8 else _BOUND)


def graphed_tier(name: str, precision: PrecisionConfig) -> Contestant:
    """Our denoiser as `tier` has it, its step replayed as a CUDA graph, whatever its size; on a CPU there are none."""

    def build(weights: Weights) -> Built:
        denoiser = weights.denoiser(fused_ops(weights.device), precision)
        _overlap_audio(denoiser, weights)
        graphs = GraphedDenoiser(denoiser, below_tokens=sys.maxsize)
        return Built(denoiser, partial(_bound, graphs, True), facts=_capture_of(graphs))

    return _contestant(name, precision, build)


def _capture_of(graphs: GraphedDenoiser) -> Callable[[], dict[str, Any]]:
    return lambda: {"capture_s": graphs.capture_s}


def _overlap_audio(denoiser: AudioVideoDenoiser, weights: Weights) -> None:
    if weights.device == "cuda" and weights.hparams.audio is not None:
        denoiser.overlap_audio(torch.cuda.Stream())


def _bound(denoiser: Denoiser, keeps_text: bool, case: Case) -> Step:
    conditioning = denoiser.prepare(case.video, case.audio)
    if not keeps_text:
        video, audio = (
            None if stream is None else replace(stream, text_keys_values=None)
            for stream in (conditioning.video, conditioning.audio)
        )
        conditioning = replace(conditioning, video=video, audio=audio)
    return lambda: denoiser(case.video, case.audio, conditioning)


def sparse_tier(
    precision: PrecisionConfig, spread: SpreadFn = on_one, *, name: str = "", graphed: bool = False
) -> Contestant:
    """Our denoiser with block-sparse attention, as an engine of this tier has it in a step at SIGMA.

    Without the library for it on a GPU, building it raises ImportError.
    """

    def build(weights: Weights) -> Built:
        ops = with_block_sparse_attention(fused_ops(weights.device), weights.device)
        denoiser = weights.denoiser(ops, precision)
        layers = weights.layers_between(precision.dense_first_layers, precision.dense_last_layers)
        settings = SparseSettings(
            use_sparse_attention(denoiser, layers, ops),
            precision.attention_density,
            precision.dense_below_tokens,
            precision.dense_above_level,
        )
        _overlap_audio(denoiser, weights)

        def attended(case: Case) -> float:
            stage = settings.begin(case.shape, case.video.positions_BAT2)
            if stage is None:
                return 1.0
            return mean_of_layers(len(layers), weights.hparams.num_layers, stage.pattern.seen_part)

        shortcuts = Shortcuts(settings)
        if graphed:
            graphs = GraphedDenoiser(denoiser, sys.maxsize, settings.in_force)
            return Built(denoiser, partial(_bound_sparse, graphs, shortcuts), attended, _capture_of(graphs), shortcuts)
        return Built(denoiser, partial(_bound_sparse, spread(denoiser, ops), shortcuts), attended, shortcuts=shortcuts)

    return Contestant(name or precision.name, precision.linear == "fp8", build, _SPARSE_BOUND)


def _bound_sparse(denoiser: Denoiser, shortcuts: Shortcuts, case: Case) -> Step:
    stage = shortcuts.begin(denoiser, case.shape, case.video.positions_BAT2)
    conditioning = denoiser.prepare(stage.ordered(case.video), case.audio)

    def step() -> Velocities:
        streams = stage.ordered(case.video), case.audio
        return stage.velocities(streams, conditioning, None, sigma=SIGMA, predictions=())

    return step


# By what a step is timed without: operations that are the plain ones again.
_GROUPS = {
    "flash_attention": ("attention",),
    "norms": ("rms_norm", "modulated_rms_norm", "modulated_rms_norm_quantised"),
    "residuals": ("gated_residual", "gated_residual_norm", "gated_residual_norm_quantised"),
    "query_key_norms": ("qk_norm_rope", "qk_norm_rope_both"),
    "gelu_epilogue": ("linear_gelu",),
    "float8_rows": ("quantise_rows", "gelu_quantised"),
}


def _without(slots: tuple[str, ...], device: str) -> OpSet:
    plain = reference_ops()
    return replace(fused_ops(device), **{slot: getattr(plain, slot) for slot in slots})


def _with_sums_apart(device: str) -> OpSet:
    """The fused operations, but for a sum and the norm that follows it, which are a kernel each."""
    fused = fused_ops(device)

    def summed_then_normed(
        norm: Callable[..., Any], x: Tensor, branch: Tensor, gate: Tensor | None, index: Tensor | None,
        modulation: Modulation | None, eps: float,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        x = fused.gated_residual(x, branch, gate, index)
        if modulation is None:
            nothing = torch.zeros(1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
            modulation = Modulation(nothing, nothing, None)
        return x, norm(x, *modulation, eps)

    return replace(
        fused,
        gated_residual_norm=partial(summed_then_normed, fused.modulated_rms_norm),
        gated_residual_norm_quantised=partial(summed_then_normed, fused.modulated_rms_norm_quantised),
    )


def _ablations(precision: PrecisionConfig) -> tuple[Contestant, ...]:
    """A tier without one thing at a time."""
    without = partial("{}_without_{}".format, precision.name)
    return (
        *(tier(without(group), partial(_without, slots), precision=precision) for group, slots in _GROUPS.items()),
        tier(without("joined_sums"), _with_sums_apart, precision=precision),
        tier(without("kept_text"), fused_ops, precision=precision, keeps_text=False),
        tier(without("audio_beside"), fused_ops, precision=precision, beside=False),
    )


def tiers(spread: SpreadFn = on_one) -> tuple[Contestant, ...]:
    """Plain operations first, then each tier, on one device or on one rank of several."""
    return (
        tier("plain", device_ops, beside=False, spread=spread),
        tier("exact", fused_ops, spread=spread),
        tier("fp8", fused_ops, precision=FP8, spread=spread),
        sparse_tier(FAST, spread),
    )


TIERS = tiers()
PLAIN, *_ = TIERS
GRAPHED = (
    graphed_tier("exact_graphed", EXACT),
    graphed_tier("fp8_graphed", FP8),
    sparse_tier(FAST, name="fast_graphed", graphed=True),
)
ABLATIONS = (*_ablations(EXACT), *_ablations(FP8))
