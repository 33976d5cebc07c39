"""Guidance as data: which extra predictions a step asks for, and by how much each pushes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.config.checks import require

# What one sample of a denoiser call can be: with the prompt; with the negative prompt; with the self-attention of some
# blocks perturbed; with the streams isolated from each other.
POSITIVE, NEGATIVE, PERTURBED, ISOLATED = "positive", "negative", "perturbed", "isolated"
# Noise levels are compared with this slack: the engine's are rounded to float32, those of a recipe are not.
LEVEL_SLACK = 1e-6


@dataclass
class StreamGuidance:
    """Scales of one stream. At these values each is void, and what it needs is not computed."""

    # Away from the negative prompt, from 1.
    cfg: float = 1.0
    # Away from the prediction with perturbed blocks, from 0.
    stg: float = 0.0
    # Away from the prediction that does not see the other stream, from 1.
    modality: float = 1.0
    # How much of the spread that guidance adds is taken back, 0 to 1.
    rescale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cfg", "stg", "modality"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value >= 0
            require(ok, f"recipe.stages.guidance.{name}", "a finite number, 0 or more", value, "use 3.0, 1.0 or so")
        way_out = "0 leaves the spread as it is"
        require(0 <= self.rescale <= 1, "recipe.stages.guidance.rescale", "between 0 and 1", self.rescale, way_out)


@dataclass
class GuidanceConfig:
    """The scales of both streams, for noise levels down to `down_to`; the last of a list holds below it too."""

    down_to: float = 0.0
    video: StreamGuidance = field(default_factory=StreamGuidance)
    audio: StreamGuidance = field(default_factory=StreamGuidance)
    # Blocks whose self-attention the perturbed prediction goes without, counted from 0.
    stg_blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        at = "recipe.stages.guidance."
        require(0 <= self.down_to <= 1, at + "down_to", "a noise level, 0 to 1", self.down_to, "0 is for all levels")
        ok = all(block >= 0 for block in self.stg_blocks)
        require(ok, at + "stg_blocks", "block numbers from 0", self.stg_blocks, "such as [29]")
        ok = bool(self.stg_blocks) or not (self.video.stg or self.audio.stg)
        require(ok, at + "stg_blocks", "one block or more where stg is above 0", self.stg_blocks, "or set stg: 0")

    def passes(self, *, has_audio: bool) -> tuple[str, ...]:
        """The predictions a step needs; those that every scale leaves out of the result are not among them."""
        streams = (self.video, self.audio) if has_audio else (self.video,)
        wanted = {
            NEGATIVE: any(stream.cfg != 1 for stream in streams),
            PERTURBED: any(stream.stg != 0 for stream in streams),
            ISOLATED: has_audio and any(stream.modality != 1 for stream in streams),
        }
        return (POSITIVE, *(name for name, is_wanted in wanted.items() if is_wanted))
