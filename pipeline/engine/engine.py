"""The render engine: a request and a recipe in, frames and sound out.

Reads as the recipe does. How text, noise, steps and decoding work is in the neighbouring modules, the loading of the
parts in `loading.py`; where the frames go and what a clip costs is known above.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.recipe import DecodeConfig, RecipeConfig, StageConfig
from pipeline.engine.components.audio_vae import AudioDecoder
from pipeline.engine.components.upsampler import LatentUpsampler, adapt_statistics, compress_range
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder, VideoEncoder
from pipeline.engine.components.vocoder import Vocoder
from pipeline.engine.conditions import HeldPicture, append_tokens, drop_appended, hold_to, num_appended_tokens
from pipeline.engine.decode import (
    CHUNK_LATENT_FRAMES,
    SMALL_CHUNK_LATENT_FRAMES,
    Delivery,
    decode_frames,
    decode_waveform,
)
from pipeline.engine.denoise import PassSpread, Scene, Texts, compute_all, denoise
from pipeline.engine.latents import (
    NoiseSource,
    Tokens,
    add_noise,
    empty_tokens,
    patchify_video,
    seeded_noise,
    unpatchify_audio,
    unpatchify_video,
)
from pipeline.engine.residency import ALL_RESIDENT, Residency
from pipeline.engine.samplers import sampler_named
from pipeline.engine.shortcuts import NO_SHORTCUTS, Shortcuts
from pipeline.engine.sigmas import noise_levels
from pipeline.engine.text import TEXT_ENCODER, TextConditioner
from pipeline.errors import DeviceBroken, OutOfMemory, UsageError
from pipeline.geometry import SPATIAL_CELL_PX, LatentShape, PixelShape, RenderShape, latent_shape
from pipeline.model.adapters import FusedAdapters
from pipeline.model.denoiser import Denoiser
from pipeline.model.graphs import GraphedDenoiser
from pipeline.records.frames import YuvFrames
from pipeline.records.request import RenderRequest
from pipeline.records.work import MEMORY_RUNGS
from pipeline.telemetry import OnStage, OnStep, ignore_steps

# Parts that may wait on the host between uses.
DENOISER = "denoiser"
VIDEO_DECODER = "video_decoder"
# For ordinary and for pinned memory of the host torch has no class of error, only these words.
_HOST_EXHAUSTED = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")


@dataclass(frozen=True)
class Streams:
    """A rendered clip: frames in chunks, decoded while iterated, and sound (channels, samples).

    A model without sound gives no waveform and no rate.
    """

    frames: Generator[YuvFrames, None, None]
    waveform: np.ndarray | None
    sample_rate_hz: int | None
    # As the model was given it: enhanced, if the request asked for that.
    prompt: str


@dataclass(frozen=True)
class Brief:
    """What is asked of all stages: text, the size in pixels, adapters in all of them, pictures to hold to."""

    texts: Texts
    rendered: PixelShape
    adapters: tuple[tuple[str | Path, float], ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Latents:
    """Both streams after the last stage, normalised: (B,C,F,H,W) and (B,C,T,mel bins), or None without sound."""

    video_BCFHW: Tensor
    audio_BCTM: Tensor | None


@dataclass(frozen=True)
class Picture:
    """A picture that the clip is held to at pixel frame `frame`: firmly (1), or less.

    `at_size` gives its pixels (1,3,1,H,W) in [-1,1] for a height and width, because every stage has its own.
    """

    at_size: Callable[[int, int], Tensor]
    frame: int = 0
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RenderEngine:
    """Every part of one model on one device, or on one of those it is spread over. Not thread-safe."""

    text: TextConditioner
    denoiser: Denoiser
    # What is fused into the denoiser, and the files of the model's adapters by their names in recipes.
    fused: FusedAdapters
    adapter_files: Mapping[str, str]
    upsampler: LatentUpsampler | None
    video_encoder: VideoEncoder
    video_decoder: VideoDecoder
    # None for a model without sound.
    audio_decoder: AudioDecoder | None
    vocoder: Vocoder | None
    device: str
    residency: Residency = ALL_RESIDENT
    # Which processes compute a guided step's predictions.
    spread: PassSpread = compute_all
    # What the precision tier leaves out of steps.
    shortcuts: Shortcuts = NO_SHORTCUTS
    # If small steps are replayed: the denoiser above, whose graphs are given up where memory is short.
    graphs: GraphedDenoiser | None = None
    # From a clip's seed to its noise.
    noise_for: Callable[[int], NoiseSource] = seeded_noise
    # If not, frames are decoded, checked and counted, and their pictures stay on the device: others take theirs.
    hands_out_frames: bool = True

    def render(
        self,
        request: RenderRequest,
        recipe: RecipeConfig,
        on_stage: OnStage,
        adapters: Sequence[tuple[str | Path, float]] = (),
        pictures: Sequence[Picture] = (),
        on_step: OnStep = ignore_steps,
        memory_rung: str = MEMORY_RUNGS[0],
    ) -> Streams:
        """One clip. `on_stage` is called as each stage begins; "decode" lasts until the frames are exhausted.

        `adapters` (file, strength) count in all stages. `on_step` is called after the text and each step of each stage,
        and before and after each chunk of frames (whose steps are frames); what it raises ends the clip and leaves the
        engine ready for the next one. `memory_rung` is one of `MEMORY_RUNGS`, each of which takes less device memory
        than the one before and gives the same bytes.

        UsageError if the recipe asks for what this engine lacks; EngineFault if a result is not finite; OutOfMemory if
        the clip does not fit the device or the host, also while the frames are iterated.
        """
        self._require_can_follow(recipe)
        shape, noise = request.shape, self.noise_for(request.seed)
        with _memory_reported(_size_of(shape)):
            chunk_latent_frames = self._make_room(memory_rung)
        with _memory_reported(_size_of(shape)), torch.inference_mode():
            on_stage("text_encode")
            prompt = request.prompt
            if request.wishes.enhance_prompt:
                prompt = self.text.enhance(prompt, request.seed)
            texts = self._texts(prompt, recipe)
            on_step("text_encode", 1, 1)
            brief = Brief(texts, shape.rendered, tuple(adapters), tuple(pictures))
            latents = self.sample(brief, recipe, noise, on_stage, on_step)

            on_stage("decode")
            waveform = None
            if self.audio_decoder is not None and self.vocoder is not None and latents.audio_BCTM is not None:
                waveform = decode_waveform(self.audio_decoder, self.vocoder, latents.audio_BCTM)
            latent_BCFHW = self._decodable(latents.video_BCFHW, recipe.decode, noise)
        rate = None if self.vocoder is None else self.vocoder.sample_rate_hz
        frames = self._frames(latent_BCFHW, shape, recipe, on_step, chunk_latent_frames)
        return Streams(frames, waveform, rate, prompt)

    @property
    def text_waits(self) -> bool:
        """If the text encoder waits on the host, so that encoding several prompts at once saves moving it."""
        return TEXT_ENCODER in self.residency.waiting

    def prefetch_texts(self, prompts: Sequence[str]) -> None:
        """Encode the prompts of clips to come in one use of the text encoder, at most as many as are kept.

        They are found when their clips are rendered, unless as many others were asked for in between. OutOfMemory if
        one does not fit the device or the host.
        """
        with _memory_reported("the text of clips to come"), torch.inference_mode():
            self.text.prefetch(prompts)

    @torch.inference_mode()
    def sample(
        self,
        brief: Brief,
        recipe: RecipeConfig,
        noise: NoiseSource,
        on_stage: OnStage,
        on_step: OnStep = ignore_steps,
    ) -> Latents:
        """All stages of the recipe: both streams go through each of them, each from where the one before ended."""
        rendered = brief.rendered
        shapes = [_latent_shape(rendered, *size) for size in recipe.stage_sizes(rendered.height, rendered.width)]
        tokens, before, sounds = self._empty(shapes[0]), shapes[0], []
        for stage, shape in zip(recipe.stages, shapes, strict=True):
            if stage.upsample != 1:
                on_stage("upsample")
                tokens = replace(tokens, video_BTC=self._upsampled(tokens.video_BTC, before, stage.adain))

            on_stage("denoise")
            named = [(self.adapter_files[stage.adapter], 1.0)] if stage.adapter else []
            with self.residency.using(DENOISER):
                self.fused.use([*brief.adapters, *named])
                tokens, before = self._denoised(tokens, shape, stage, brief, noise, on_step), shape
            sounds.append(tokens.audio_BTC)
        sound_BTC = sounds[recipe.sound_from_stage - 1]
        return Latents(unpatchify_video(tokens.video_BTC, before), self._unpatchified(sound_BTC))

    def _denoised(
        self,
        tokens: Tokens,
        shape: LatentShape,
        stage: StageConfig,
        brief: Brief,
        noise: NoiseSource,
        on_step: OnStep,
    ) -> Tokens:
        """One stage: noise, then pictures, then steps, in the order in which the reference draws its noise."""
        frames = [picture.frame for picture in brief.pictures]
        sigma = noise_levels(stage.levels(shape.num_video_tokens))[0]
        start = add_noise(append_tokens(tokens, num_appended_tokens(frames, shape)), noise, sigma)
        held = [self._held(picture, shape, stage, noise) for picture in brief.pictures]
        hold = hold_to(held, start, shape)
        if hold is not None:
            start = replace(start, video_BTC=hold.blend(start.video_BTC))
        scene = Scene(shape, brief.texts, hold)
        end = denoise(self.denoiser, start, scene, stage, noise, on_step, self.spread, self.shortcuts)
        return drop_appended(end, shape)

    def _held(self, picture: Picture, shape: LatentShape, stage: StageConfig, noise: NoiseSource) -> HeldPicture:
        pixels_B31HW = picture.at_size(shape.height * SPATIAL_CELL_PX, shape.width * SPATIAL_CELL_PX).to(self.device)
        # LTX-Video takes a draw from what the encoder thinks possible, LTX-2 the likeliest.
        draw = (lambda size: noise(tuple(size))) if stage.family == "ltx_video" else None
        return HeldPicture(self.video_encoder.encode(pixels_B31HW, noise=draw), picture.frame, picture.strength)

    def _texts(self, prompt: str, recipe: RecipeConfig) -> Texts:
        negative = [recipe.negative_prompt] if recipe.has_guidance else []
        return Texts(*self.text.encode_all(prompt, *negative))

    def _empty(self, shape: LatentShape) -> Tokens:
        video, audio = self.denoiser.hparams.video, self.denoiser.hparams.audio
        audio_channels = None if audio is None else audio.in_channels
        return empty_tokens(shape, video_channels=video.in_channels, audio_channels=audio_channels, device=self.device)

    def _upsampled(self, video_BTC: Tensor, shape: LatentShape, adain: float) -> Tensor:
        assert self.upsampler is not None, "asked for before the first stage"
        latent_BCFHW = unpatchify_video(video_BTC, shape)
        upsampled_BCFHW = self.upsampler.upsample(latent_BCFHW)
        if adain:
            upsampled_BCFHW = adapt_statistics(upsampled_BCFHW, latent_BCFHW, factor=adain)
        return patchify_video(upsampled_BCFHW)

    def _unpatchified(self, audio_BTC: Tensor | None) -> Tensor | None:
        if audio_BTC is None or self.audio_decoder is None:
            return None
        return unpatchify_audio(audio_BTC, self.audio_decoder.num_latent_bins)

    def _decodable(self, latent_BCFHW: Tensor, decode: DecodeConfig, noise: NoiseSource) -> Tensor:
        """The latents as the recipe wants them decoded. Noise comes before the tone mapping, as in LTX-Video."""
        if self.video_decoder.takes_noise:
            drawn_BCFHW = noise(tuple(latent_BCFHW.shape)).to(latent_BCFHW.device)
            latent_BCFHW = torch.lerp(latent_BCFHW, drawn_BCFHW, decode.noise_scale)
        return compress_range(latent_BCFHW, compression=decode.tone_map) if decode.tone_map else latent_BCFHW

    def _frames(
        self, latent_BCFHW: Tensor, shape: RenderShape, recipe: RecipeConfig, on_step: OnStep, chunk_latent_frames: int
    ) -> Generator[YuvFrames, None, None]:
        noise = DecodeNoise(recipe.decode.timestep) if self.video_decoder.takes_noise else None
        chunks = decode_frames(
            self.video_decoder,
            latent_BCFHW,
            shape,
            noise=noise,
            resize=recipe.resize,
            delivery=Delivery(chunk_latent_frames, self.hands_out_frames),
        )
        num_done, num_frames = 0, shape.asked.num_frames
        with _memory_reported(_size_of(shape)), self.residency.using(VIDEO_DECODER):
            on_step("decode", 0, num_frames)
            for frames in chunks:
                num_done += frames.num_frames
                yield frames
                on_step("decode", num_done, num_frames)

    def _make_room(self, memory_rung: str) -> int:
        """Do what the rung and those before it say; returns the latent frames of a decoded chunk."""
        rung = MEMORY_RUNGS.index(memory_rung)
        if self.graphs is not None:
            self.graphs.allow(rung == 0)
        if rung >= MEMORY_RUNGS.index("offload"):
            self.residency.tighten()
        else:
            self.residency.loosen()
        if rung:
            self.residency.release_unused()
        return SMALL_CHUNK_LATENT_FRAMES if rung else CHUNK_LATENT_FRAMES

    def _require_can_follow(self, recipe: RecipeConfig) -> None:
        hparams = self.denoiser.hparams
        family, last = hparams.family, hparams.num_layers - 1
        for stage in recipe.stages:
            sampler_named(stage.sampler)
            if stage.family != family:
                raise UsageError(
                    f"recipe {recipe.name} is for models of family {stage.family}, this one is {family}; use another"
                )
            if stage.adapter and stage.adapter not in self.adapter_files:
                raise UsageError(
                    f"recipe {recipe.name} needs model.adapters.{stage.adapter}, got {sorted(self.adapter_files)}; "
                    "name its file in the model's YAML or use another recipe"
                )
            for guidance in stage.guidance:
                if any(block > last for block in guidance.stg_blocks):
                    raise UsageError(
                        f"recipe.stages.guidance.stg_blocks must be blocks of the model, 0 to {last}, got "
                        f"{guidance.stg_blocks}; correct recipe {recipe.name} or model.tuning.stg_blocks"
                    )
        if any(stage.upsample != 1 for stage in recipe.stages) and self.upsampler is None:
            raise UsageError(f"recipe {recipe.name} needs model.spatial_upscaler, got none; use a recipe of one stage")


def _latent_shape(rendered: PixelShape, height: int, width: int) -> LatentShape:
    shape = latent_shape(replace(rendered, height=height, width=width))
    # A single frame at a high rate rounds to no sound at all, which neither denoiser nor decoder can take.
    return replace(shape, num_audio_latents=max(1, shape.num_audio_latents))


def _size_of(shape: RenderShape) -> str:
    pixels = shape.rendered
    return f"a clip of {pixels.width}x{pixels.height}, {pixels.num_frames} frames"


@contextmanager
def _memory_reported(what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        place = _exhausted(error)
        if isinstance(error, torch.AcceleratorError) and place is None:
            # Of an illegal access or a memory error of the chip: every later call fails too.
            raise DeviceBroken(f"{what} broke the device: {str(error).splitlines()[0]}") from error
        if place is None:
            raise
        # Python's own MemoryError says nothing more.
        reason = str(error).splitlines()[0] if str(error) else "memory is exhausted"
        raise OutOfMemory(f"{what} does not fit the {place}: {reason}") from error


def _exhausted(error: MemoryError | RuntimeError) -> str | None:
    """Whose memory ran out, if that is what `error` says."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _HOST_EXHAUSTED):
        return "host"
    return None
