"""A way of rendering as data: stages, noise levels, samplers, guidance, decoding, and how the file is encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pipeline.config.checks import require
from pipeline.config.guidance import LEVEL_SLACK, POSITIVE, GuidanceConfig
from pipeline.config.model import FAMILIES, ClipDefaults, ModelConfig
from pipeline.config.schedule import ScheduleConfig

# Presets of libx264, fastest first, and the samplers of `engine/samplers.py` (a test holds them equal).
X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
SAMPLERS = ("euler", "euler_ancestral", "euler_gradient", "euler_cfg_pp", "dpmpp_2m", "res_2s")
# What a perturbed prediction has in place of self-attention: `pipeline/model/streams.py`.
STG_STRATEGIES = ("values", "attention", "residual", "block")
CELL_PX = 32
NEGATIVE_PROMPT = (
    "blurry, distorted, flickering or overexposed picture, compression artefacts, watermark, deformed faces and hands, "
    "jerky motion, muffled or noisy sound, speech out of step with the lips"
)


@dataclass
class StageConfig:
    """One run of the sampling loop: at which size, along which noise levels, guided how, starting from what.

    A stage after the first starts from the previous stage's latents, noised again to its first level.
    """

    # The first stage's size: this part of the rendered size, rounded down to the grid of 32 px.
    size_factor: float = 1.0
    # A later stage's size: this multiple of the stage before, 1.0 (the same) or 2.0 (the latents are upsampled).
    upsample: float = 1.0
    # 1.0 gives each channel of upsampled latents the mean and spread it had before, 0.0 leaves them alone.
    adain: float = 0.0
    # Descending noise levels, the last one 0: a step for each neighbouring pair. Or a schedule that computes them.
    sigmas: list[float] = field(default_factory=list)
    schedule: ScheduleConfig | None = None
    sampler: str = "euler"
    # How much of each step's noise is fresh, for the samplers that draw noise: 0 none, 1 all.
    eta: float = 0.5
    # By falling noise level; empty for none. See `config/guidance.py`.
    guidance: list[GuidanceConfig] = field(default_factory=list)
    stg_strategy: str = "values"
    # Scale the negative prediction to the positive one first (arXiv 2503.18886).
    cfg_star: bool = False
    # "ltx2": guidance combines clean latents, and a held token's timestep is its share of the noise level.
    # "ltx_video": guidance combines velocities, and a held token stands still until the level has fallen to its own.
    family: str = "ltx2"
    # All predictions of a step in one call of the denoiser, which is faster, or one after the other, which takes less
    # memory.
    batch_passes: bool = True
    # A name in the model's `adapters`: fused into the denoiser, at strength 1.0, for this stage.
    adapter: str = ""

    def __post_init__(self) -> None:
        at = "recipe.stages."
        samplers, strategies = ", ".join(SAMPLERS), ", ".join(STG_STRATEGIES)
        require(0 < self.size_factor <= 1, at + "size_factor", "above 0, at most 1", self.size_factor, "0.5 is half")
        require(self.upsample in (1.0, 2.0), at + "upsample", "1.0 or 2.0", self.upsample, "2.0 doubles both sides")
        require(0 <= self.adain <= 1, at + "adain", "between 0 and 1", self.adain, "use 0")
        require(self.sampler in SAMPLERS, at + "sampler", f"one of {samplers}", self.sampler, "use euler")
        require(0 <= self.eta <= 1, at + "eta", "between 0 and 1", self.eta, "use 0.5")
        ok = self.stg_strategy in STG_STRATEGIES
        require(ok, at + "stg_strategy", f"one of {strategies}", self.stg_strategy, "use values")
        ok = self.stg_strategy == "values" or self.family != "ltx2"
        require(ok, at + "stg_strategy", "values in a stage of LTX-2", self.stg_strategy, "use values")
        require(self.family in FAMILIES, at + "family", " or ".join(FAMILIES), self.family, "use the model's")
        downs = [entry.down_to for entry in self.guidance]
        way_out = "the first entry at or below a step's level counts"
        require(_falls(downs), at + "guidance", "in order of falling down_to", downs, way_out)
        if self.sampler == "euler_cfg_pp":
            ok = self.family == "ltx2" and bool(downs) and all(entry.video.cfg != 1 for entry in self.guidance)
            way_out = "guide the stage by a negative prompt"
            require(ok, at + "sampler", "another one in a stage without cfg, or of LTX-Video", self.sampler, way_out)
        if self.schedule is None:
            way_out = "give descending noise levels that end in 0, such as [1.0, 0.725, 0.0], or a schedule"
            ok = len(self.sigmas) >= 2 and _falls(self.sigmas) and self.sigmas[0] <= 1 and self.sigmas[-1] == 0
            require(ok, at + "sigmas", "two or more descending levels from at most 1 to 0", self.sigmas, way_out)
        else:
            require(not self.sigmas, at + "sigmas", "empty beside a schedule", self.sigmas, "give one of the two")

    @property
    def is_for_distilled(self) -> bool:
        """If only a distilled model can follow it: along given noise levels, unguided, without `adapter: distilled`."""
        guided = any(entry.passes(has_audio=True) != (POSITIVE,) for entry in self.guidance)
        return bool(self.sigmas) and not guided and self.adapter != "distilled"

    def levels(self, num_tokens: int) -> list[float]:
        """Descending noise levels that end in 0, for a stage of `num_tokens` video tokens."""
        return list(self.sigmas) if self.schedule is None else self.schedule.levels(num_tokens)

    def guidance_at(self, sigma: float) -> GuidanceConfig | None:
        """What holds at a noise level; None where the stage is not guided."""
        last = self.guidance[-1] if self.guidance else None
        return next((entry for entry in self.guidance if entry.down_to <= sigma + LEVEL_SLACK), last)

    def samples_of_a_call(self, *, has_audio: bool) -> int:
        """The most samples that one call of the denoiser is given."""
        return self.max_passes(has_audio=has_audio) if self.batch_passes else 1

    def max_passes(self, *, has_audio: bool) -> int:
        """The most predictions that a step needs."""
        return max((len(entry.passes(has_audio=has_audio)) for entry in self.guidance), default=1)

    def num_samples(self, num_tokens: int, *, has_audio: bool, guidance_degree: int = 1) -> int:
        """Samples the denoiser is given in all steps: every prediction of every evaluation counts one.

        With `guidance_degree` GPUs that share the predictions of an evaluation, of the one that is given most.
        """
        by_level = self.samples_by_level(num_tokens, has_audio=has_audio, guidance_degree=guidance_degree)
        return sum(count for _, count in by_level)

    def samples_by_level(
        self, num_tokens: int, *, has_audio: bool, guidance_degree: int = 1
    ) -> list[tuple[float, int]]:
        """The samples of `num_samples` step by step, each with the noise level it starts from."""
        by_level = []
        for sigma, after in pairwise(self.levels(num_tokens)):
            guidance = self.guidance_at(sigma)
            passes = (POSITIVE,) if guidance is None else guidance.passes(has_audio=has_audio)
            # res_2s looks twice a step, and once more at the end (`engine/samplers.py`).
            evaluations = 1 if self.sampler != "res_2s" else 2 if after else 3
            by_level.append((sigma, evaluations * math.ceil(len(passes) / guidance_degree)))
        return by_level


@dataclass
class DecodeConfig:
    """From the last stage's latents to pictures. The numbers are LTX-Video's; LTX-2 has no use for them."""

    # 0 to 1: how much large latent values are compressed.
    tone_map: float = 0.0
    # The noise level a decoder is told that knows one, and the part of fresh noise its latents get.
    timestep: float = 0.05
    noise_scale: float = 0.025

    def __post_init__(self) -> None:
        for name in ("tone_map", "timestep", "noise_scale"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"recipe.decode.{name}", "between 0 and 1", value, "see pipeline/config/recipe.py")


@dataclass
class EncodeConfig:
    """Settings of the MP4 writer. All but `thumbnail_quality` change its bytes, and so are in the content key."""

    preset: str = "veryfast"
    crf: int = 18
    # A constant, not the machine's cores: x264 writes other bytes for another number of threads. A natural clip of
    # 1920x1088x121 took two 3.9 s on a GPU host of 16 cores, 12 1.3 s and 24 0.93 s, in which ten of the cores work.
    x264_threads: int = 24
    audio_bitrate_kbps: int = 192
    thumbnail_quality: int = 85

    def __post_init__(self) -> None:
        presets = ", ".join(X264_PRESETS)
        require(self.preset in X264_PRESETS, "recipe.encode.preset", f"one of {presets}", self.preset, "use veryfast")
        require(0 <= self.crf <= 51, "recipe.encode.crf", "between 0 and 51", self.crf, "18 is visually lossless")
        require(self.x264_threads >= 1, "recipe.encode.x264_threads", "1 or more", self.x264_threads, "use 24")


@dataclass
class RecipeConfig:
    """A way of rendering: stages, and how the file is encoded. Data only; one engine executes all of them."""

    name: str = ""
    clip: ClipDefaults = field(default_factory=ClipDefaults)
    # Sizes off the grid are rendered at the next grid size and cropped; false refuses them.
    crop: bool = True
    stages: list[StageConfig] = field(default_factory=list)
    # Frames of another size than the rendered one are resized to it; false demands that the last stage has this size.
    resize: bool = False
    # The stage, counted from 1, whose sound ships; 0 is the last.
    sound_from_stage: int = 0
    # What guided stages steer away from in a row that does not say.
    negative_prompt: str = NEGATIVE_PROMPT
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def __post_init__(self) -> None:
        require(bool(self.stages), "recipe.stages", "one stage or more", self.stages, "see conf/recipe/")
        first, later = self.stages[0], self.stages[1:]
        way_out = "give it size_factor"
        require(first.upsample == 1, "the first of recipe.stages", "without upsample", first.upsample, way_out)
        factors = [stage.size_factor for stage in later]
        ok = all(factor == 1 for factor in factors)
        require(ok, "the later of recipe.stages", "without size_factor", factors, "give them upsample")
        if not self.resize:
            factor = first.size_factor * math.prod(stage.upsample for stage in later)
            require(factor == 1, "the last of recipe.stages", "at the rendered size", factor, "or set recipe.resize")
        ok = 0 <= self.sound_from_stage <= len(self.stages)
        way_out = f"use 1 to {len(self.stages)}, or 0 for the last"
        require(ok, "recipe.sound_from_stage", "the number of a stage", self.sound_from_stage, way_out)

    @property
    def grid_px(self) -> int:
        """Both sides must be multiples of this, so that each stage has whole latent cells of 32 px."""
        return CELL_PX if self.resize else round(CELL_PX / self.stages[0].size_factor)

    @property
    def min_side_px(self) -> int:
        """The smallest rendered side of which two latent cells are left to decode: decoders pad by reflection."""
        side = self.grid_px
        while self.stage_sizes(side, side)[-1][0] < 2 * CELL_PX:
            side += self.grid_px
        return side

    @property
    def has_guidance(self) -> bool:
        """If a negative prompt makes a difference."""
        return any(entry.video.cfg != 1 or entry.audio.cfg != 1 for stage in self.stages for entry in stage.guidance)

    def max_passes(self, *, has_audio: bool) -> int:
        """The most predictions that a step of any stage needs."""
        return max(stage.max_passes(has_audio=has_audio) for stage in self.stages)

    def stage_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width in pixels of each stage, for a rendered size. At least one cell."""

        def first(side: int) -> int:
            return max(1, int(side * self.stages[0].size_factor) // CELL_PX) * CELL_PX

        sizes = [(first(height), first(width))]
        for stage in self.stages[1:]:
            factor = int(stage.upsample)
            sizes.append((sizes[-1][0] * factor, sizes[-1][1] * factor))
        return sizes


@dataclass(frozen=True)
class Recipes:
    """All recipes under the settings of a job, by name."""

    usable: dict[str, RecipeConfig]
    # Why the settings do not go with the others.
    unusable: dict[str, str]


def misfit(recipe: RecipeConfig, model: ModelConfig) -> str:
    """Why `model` cannot follow `recipe`; empty if it can.

    A distilled model may follow guided recipes: slower than it need be, but nobody published that it fails.
    """
    last = model.size.num_layers - 1
    for stage in recipe.stages:
        if stage.family != model.family:
            return f"it is for models of family {stage.family}, {model.name} is {model.family}"
        if stage.is_for_distilled and not model.distilled:
            return f"its few noise levels without guidance are for distilled models, {model.name} is not one"
        if stage.adapter and stage.adapter not in model.adapters:
            names = ", ".join(sorted(model.adapters)) or "none"
            return f"it needs model.adapters.{stage.adapter}, {model.name} has {names}"
        blocks = [block for entry in stage.guidance for block in entry.stg_blocks]
        if any(block > last for block in blocks):
            return f"its stg_blocks must be 0 to {last}, got {blocks}; correct them or model.tuning.stg_blocks"
        if stage.upsample != 1 and not model.spatial_upscaler:
            return f"it needs model.spatial_upscaler, {model.name} has none"
    return ""


def unsupported_overrides(
    recipe: RecipeConfig, *, num_steps: int | None, cfg_scale: float | None, stg_scale: float | None
) -> list[str]:
    """A problem for each override of a row that the recipe cannot honour; None asks for nothing.

    Steps can be counted anew where a schedule computes them and none are skipped; a scale can be set where a stage is
    guided alike at all noise levels.
    """
    scheduled = [stage.schedule for stage in recipe.stages if stage.schedule is not None]
    guided = [stage.guidance for stage in recipe.stages if stage.guidance]
    alike = bool(guided) and all(len(guidance) == 1 for guidance in guided)
    honoured = {
        "num_steps": bool(scheduled) and not any(each.skip_first or each.skip_last for each in scheduled),
        "cfg_scale": alike,
        "stg_scale": alike and all(guidance[0].stg_blocks for guidance in guided),
    }
    problems = []
    for name, value in {"num_steps": num_steps, "cfg_scale": cfg_scale, "stg_scale": stg_scale}.items():
        at_least = 1 if name == "num_steps" else 0
        if value is None:
            continue
        if not honoured[name]:
            problems.append(f"{name} cannot be honoured by recipe {recipe.name}, got {value}; leave the column empty")
        elif not (math.isfinite(value) and value >= at_least):
            problems.append(f"{name} must be {at_least} or more, got {value}; leave the column empty")
    return problems


def resolve(
    recipe: RecipeConfig,
    *,
    num_steps: int | None,
    cfg_scale: float | None,
    stg_scale: float | None,
    negative_prompt: str | None = None,
) -> RecipeConfig:
    """The recipe with a row's overrides, of which `unsupported_overrides` has found no problem.

    The scales are those of the picture; the sound keeps the recipe's.
    """

    def scaled(guidance: GuidanceConfig) -> GuidanceConfig:
        cfg = guidance.video.cfg if cfg_scale is None else float(cfg_scale)
        stg = guidance.video.stg if stg_scale is None else float(stg_scale)
        return replace(guidance, video=replace(guidance.video, cfg=cfg, stg=stg))

    def overridden(stage: StageConfig) -> StageConfig:
        schedule = stage.schedule
        if schedule is not None and num_steps is not None:
            schedule = replace(schedule, num_steps=num_steps)
        return replace(stage, schedule=schedule, guidance=[scaled(entry) for entry in stage.guidance])

    negative = recipe.negative_prompt if negative_prompt is None else negative_prompt
    return replace(recipe, stages=[overridden(stage) for stage in recipe.stages], negative_prompt=negative)


def _falls(levels: list[float]) -> bool:
    return all(math.isfinite(level) for level in levels) and all(a > b for a, b in pairwise(levels))
