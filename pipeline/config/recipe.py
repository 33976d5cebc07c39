"""A way of rendering as data: stages, noise levels, sampler, and how the file is encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.config.checks import require
from pipeline.config.model import ClipDefaults

# Presets of libx264, fastest first, and the sampling steps of `engine/samplers.py` (a test holds them equal).
X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
SAMPLERS = ("euler",)


@dataclass
class StageConfig:
    """One pass of the sampling loop: at which size, along which noise levels, starting from what."""

    # Divisor of the rendered size: 2 is half size.
    size_divisor: int = 1
    # Descending noise levels, the last one 0: a step for each neighbouring pair. A stage after the first starts
    # from the previous stage's latents, noised again to the first level.
    sigmas: list[float] = field(default_factory=list)
    sampler: str = "euler"

    def __post_init__(self) -> None:
        way_out = "give descending noise levels that end in 0, such as [1.0, 0.725, 0.0]"
        finite = all(math.isfinite(s) for s in self.sigmas)
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        ok = len(self.sigmas) >= 2 and finite and falling and self.sigmas[0] <= 1 and self.sigmas[-1] == 0
        require(ok, "recipe.stages.sigmas", "two or more descending levels from at most 1 to 0", self.sigmas, way_out)
        samplers = ", ".join(SAMPLERS)
        require(self.sampler in SAMPLERS, "recipe.stages.sampler", f"one of {samplers}", self.sampler, "use euler")
        ok = self.size_divisor in (1, 2)
        require(ok, "recipe.stages.size_divisor", "1 or 2", self.size_divisor, "use 2 for half")


@dataclass
class EncodeConfig:
    """Settings of the MP4 writer. All but `thumbnail_quality` change its bytes, and so are in the content key."""

    preset: str = "veryfast"
    crf: int = 18
    # A constant, not the machine's cores: x264 writes other bytes for another number of threads.
    x264_threads: int = 2
    audio_bitrate_kbps: int = 192
    thumbnail_quality: int = 85

    def __post_init__(self) -> None:
        presets = ", ".join(X264_PRESETS)
        require(self.preset in X264_PRESETS, "recipe.encode.preset", f"one of {presets}", self.preset, "use veryfast")
        require(0 <= self.crf <= 51, "recipe.encode.crf", "between 0 and 51", self.crf, "18 is visually lossless")
        require(self.x264_threads >= 1, "recipe.encode.x264_threads", "1 or more", self.x264_threads, "use 2")


@dataclass
class RecipeConfig:
    """A way of rendering: stages, and how the file is encoded. Data only; one engine executes all of them."""

    name: str = ""
    clip: ClipDefaults = field(default_factory=ClipDefaults)
    # Sizes off the grid are rendered at the next grid size and cropped; false refuses them.
    crop: bool = True
    stages: list[StageConfig] = field(default_factory=list)
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def __post_init__(self) -> None:
        require(bool(self.stages), "recipe.stages", "one stage or more", self.stages, "see conf/recipe/")
        last = self.stages[-1].size_divisor
        require(last == 1, "the last of recipe.stages", "at full size, size_divisor 1", last, "see conf/recipe/")

    @property
    def grid_px(self) -> int:
        """Both sides must be multiples of this: one latent cell (32 px) at the smallest stage."""
        return 32 * max(stage.size_divisor for stage in self.stages)
