"""Which model is rendered with, and in which numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.checks import require


@dataclass
class ClipDefaults:
    """The clip a row asks for when it says nothing else."""

    width: int = 1536
    height: int = 1024
    num_frames: int = 121
    fps: float = 24.0

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            size = getattr(self, name)
            require(size >= 2 and size % 2 == 0, f"clip.{name}", "even and at least 2", size, "use the next even size")
        require(self.num_frames % 8 == 1, "clip.num_frames", "8k+1", self.num_frames, "use 121")
        require(1 <= self.fps <= 240, "clip.fps", "between 1 and 240", self.fps, "use 24")


@dataclass
class DenoiserSize:
    """What the planner needs to count operations without opening the checkpoint; checked against it at load."""

    num_layers: int = 48
    video_width: int = 4096
    audio_width: int = 2048
    text_tokens: int = 1024
    # Operations outside the denoiser, for the estimate: of the text encoder per prompt token, of the video
    # decoder per output pixel.
    text_flops_per_token: float = 0.0
    decode_flops_per_pixel: float = 0.0
    # Attention heads of each stream, which layouts divide.
    num_heads: int = 32
    num_audio_heads: int = 32

    @property
    def has_audio(self) -> bool:
        return self.audio_width > 0

    @property
    def heads(self) -> tuple[int, ...]:
        """Of each stream."""
        return (self.num_heads, self.num_audio_heads) if self.has_audio else (self.num_heads,)


FAMILIES = ("ltx2", "ltx_video")
# Which noise level gates what one stream takes from the other; the releases of the reference differ in it.
EXCHANGE_TIMESTEPS = ("1.2.0", "1.0.0", "first")


@dataclass
class Tuning:
    """Numbers of published recipes that differ from model to model; the recipes refer to them."""

    num_steps: int = 40
    # Blocks that spatio-temporal guidance perturbs, counted from 0.
    stg_blocks: list[int] = field(default_factory=lambda: [29])
    tone_map: float = 0.0


@dataclass
class ModelConfig:
    """Where a model's files are and what they are. Paths are relative to `folder` unless absolute."""

    name: str = "nano"
    folder: str = ""
    checkpoint: str = ""
    text_encoder: str = ""
    spatial_upscaler: str = ""
    # Weights that recipes and rows may add, by name: adapters, and those that move the camera.
    adapters: dict[str, str] = field(default_factory=dict)
    cameras: dict[str, str] = field(default_factory=dict)
    # Where jobs.stage_weights fetches a part from, by the part's name: `checkpoint`, `text_encoder`,
    # `spatial_upscaler`, an adapter, a camera move, or `text_encoder/tokenizer` for a folder within a part. A path or a
    # URI: hf://<owner>/<repository>[@<revision>]/<file or folder>, s3://...
    sources: dict[str, str] = field(default_factory=dict)
    license: str = ""
    # ltx2 or ltx_video: which recipes it can follow.
    family: str = "ltx2"
    # If it follows few noise levels without guidance.
    distilled: bool = False
    # If its text encoder can rewrite prompts: Gemma can, T5's encoder has no output words.
    can_enhance: bool = True
    exchange_timesteps: str = "1.2.0"
    # Where a worker keeps its copy of a model whose folder is in a bucket.
    cache: str = "~/.cache/ltx-render-farm"
    # True only for the toy-width model, whose files this project builds itself.
    built_here: bool = False
    clip: ClipDefaults = field(default_factory=ClipDefaults)
    size: DenoiserSize = field(default_factory=DenoiserSize)
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        require(self.family in FAMILIES, "model.family", " or ".join(FAMILIES), self.family, "see conf/model/family/")
        rules = ", ".join(EXCHANGE_TIMESTEPS)
        ok = self.exchange_timesteps in EXCHANGE_TIMESTEPS
        require(ok, "model.exchange_timesteps", f"one of {rules}", self.exchange_timesteps, 'use "1.2.0"')
        both = sorted(self.adapters.keys() & self.cameras.keys())
        require(not both, "model.adapters and model.cameras", "of different names", both, "rename one")
        known = {*self.parts(), *self.extras()}
        unknown = sorted(name for name in self.sources if name.split("/")[0] not in known)
        require(not unknown, "model.sources", "of parts of the model", unknown, f"use {', '.join(sorted(known))}")

    def parts(self) -> dict[str, str]:
        """The files and folders that every clip needs, by part; they are the model's fingerprint."""
        names = ("checkpoint", "text_encoder", "spatial_upscaler")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def extras(self) -> dict[str, str]:
        """The files that only some recipes and rows need, by name."""
        return {**self.adapters, **self.cameras}


# At 0.2, made-up heads at 1920x1088 lose more of their softmax than tests/engine/test_block_choice.py allows.
MIN_DENSITY = 0.25


@dataclass
class PrecisionConfig:
    """How numbers are held and which operations compute them. Part of the content key."""

    name: str = "exact"
    # "checkpoint" computes in the dtype the weights are stored in: float32 for nano, bfloat16 as published.
    dtype: str = "checkpoint"
    # fused: the fastest operations the device has; on a CPU, and with reference, plain torch.
    kernels: str = "fused"
    # exact, or fp8: row-wise scaled e4m3 weights and activations in the blocks' linear layers.
    linear: str = "exact"
    # With fp8: so many blocks at the start and at the end keep the checkpoint's numbers.
    keep_first_blocks: int = 3
    keep_last_blocks: int = 3
    # exact, or block_sparse: video tokens see some blocks of 128 others, chosen by what is in them, not all.
    attention: str = "exact"
    # With block_sparse: the part of the blocks that is seen. In short clips it may be more.
    attention_density: float = 0.25
    # With block_sparse, what stays dense: stages of fewer video tokens, steps above a noise level (in which the clip
    # takes shape), and so many layers at the start and at the end.
    dense_below_tokens: int = 4096
    dense_above_level: float = 0.95
    dense_first_layers: int = 3
    dense_last_layers: int = 3
    # Above 0: a step whose first layer changes its input as the last computed step's did, but for this part, reuses
    # what the other layers did then. For recipes of many steps.
    step_cache_threshold: float = 0.0
    # 8 and 4 quantise the text encoder's weights, whose 24 GB are what a small card lacks first.
    text_encoder_bits: int = 16
    # Threads of torch on the CPU: a constant, because sums differ between thread counts. One, because two threads on
    # busy cores wait for each other: a 0.11 s nano clip took up to 9.9 s beside other work.
    torch_threads: int = 1

    def __post_init__(self) -> None:
        dtypes = ("checkpoint", "float32", "bfloat16")
        require(self.dtype in dtypes, "precision.dtype", " or ".join(dtypes), self.dtype, "use precision=exact")
        ok = self.kernels in ("fused", "reference")
        require(ok, "precision.kernels", "fused or reference", self.kernels, "use fused")
        require(self.linear in ("exact", "fp8"), "precision.linear", "exact or fp8", self.linear, "use precision=fp8")
        ok = self.linear != "fp8" or self.dtype != "float32"
        way_out = "use bfloat16, or precision.linear=exact"
        require(ok, "precision.dtype", "checkpoint or bfloat16 with fp8", self.dtype, way_out)
        for name in ("keep_first_blocks", "keep_last_blocks", "dense_first_layers", "dense_last_layers"):
            require(getattr(self, name) >= 0, f"precision.{name}", "0 or more", getattr(self, name), "use 3")
        self._require_shortcuts()
        bits = self.text_encoder_bits
        require(bits in (4, 8, 16), "precision.text_encoder_bits", "4, 8 or 16", bits, "16 keeps the numbers")
        require(self.torch_threads >= 1, "precision.torch_threads", "1 or more", self.torch_threads, "use 1")

    def _require_shortcuts(self) -> None:
        kinds = ("exact", "block_sparse")
        ok = self.attention in kinds
        require(ok, "precision.attention", " or ".join(kinds), self.attention, "use precision=fast")
        density, threshold = self.attention_density, self.step_cache_threshold
        rule = f"between {MIN_DENSITY} and 1"
        require(MIN_DENSITY <= density <= 1, "precision.attention_density", rule, density, "use 0.25")
        tokens = self.dense_below_tokens
        require(tokens >= 0, "precision.dense_below_tokens", "0 or more", tokens, "use 4096")
        level = self.dense_above_level
        require(0 <= level <= 1, "precision.dense_above_level", "a noise level, 0 to 1", level, "1 keeps no step dense")
        require(
            0 <= threshold < 1, "precision.step_cache_threshold", "from 0 to below 1", threshold, "0 reuses nothing"
        )
