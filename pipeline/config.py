"""Every setting as a typed dataclass, filled once from YAML and plain objects from then on.

Defaults live here; `conf/**/*.yaml` states only what differs. Nothing below this module knows OmegaConf. Schema
classes are not frozen because OmegaConf treats a frozen one as read-only even while it composes.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def _require(ok: bool, name: str, rule: str, value: object, way_out: str) -> None:
    if not ok:
        raise UsageError(f"{name} must be {rule}, got {value!r}; {way_out}")


# Presets of libx264, fastest first, and the sampling steps of `engine/samplers.py` (a test holds them equal).
X264_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
SAMPLERS = ("euler",)


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
            _require(size >= 2 and size % 2 == 0, f"clip.{name}", "even and at least 2", size, "use the next even size")
        _require(self.num_frames % 8 == 1, "clip.num_frames", "8k+1", self.num_frames, "use 121")
        _require(1 <= self.fps <= 240, "clip.fps", "between 1 and 240", self.fps, "use 24")


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


@dataclass
class ModelConfig:
    """Where a model's files are and what they are. Paths are relative to `folder` unless absolute."""

    name: str = "nano"
    folder: str = ""
    checkpoint: str = ""
    text_encoder: str = ""
    spatial_upscaler: str = ""
    license: str = ""
    # Where a worker keeps its copy of a model whose folder is in a bucket.
    cache: str = "~/.cache/ltx-render-farm"
    # True only for the toy-width model, whose files this project builds itself.
    built_here: bool = False
    clip: ClipDefaults = field(default_factory=ClipDefaults)
    size: DenoiserSize = field(default_factory=DenoiserSize)


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
        _require(ok, "recipe.stages.sigmas", "two or more descending levels from at most 1 to 0", self.sigmas, way_out)
        samplers = ", ".join(SAMPLERS)
        _require(self.sampler in SAMPLERS, "recipe.stages.sampler", f"one of {samplers}", self.sampler, "use euler")
        ok = self.size_divisor in (1, 2)
        _require(ok, "recipe.stages.size_divisor", "1 or 2", self.size_divisor, "use 2 for half")


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
        _require(self.preset in X264_PRESETS, "recipe.encode.preset", f"one of {presets}", self.preset, "use veryfast")
        _require(0 <= self.crf <= 51, "recipe.encode.crf", "between 0 and 51", self.crf, "18 is visually lossless")
        _require(self.x264_threads >= 1, "recipe.encode.x264_threads", "1 or more", self.x264_threads, "use 2")


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
        _require(bool(self.stages), "recipe.stages", "one stage or more", self.stages, "see conf/recipe/")
        last = self.stages[-1].size_divisor
        _require(last == 1, "the last of recipe.stages", "at full size, size_divisor 1", last, "see conf/recipe/")

    @property
    def grid_px(self) -> int:
        """Both sides must be multiples of this: one latent cell (32 px) at the smallest stage."""
        return 32 * max(stage.size_divisor for stage in self.stages)


@dataclass
class PrecisionConfig:
    """How numbers are held and which operations compute them. Part of the content key."""

    name: str = "exact"
    # "checkpoint" computes in the dtype the weights are stored in: float32 for nano, bfloat16 as published.
    dtype: str = "checkpoint"
    kernels: str = "reference"
    # Threads of torch on the CPU: a constant, because sums differ between thread counts. One, because two threads on
    # busy cores wait for each other: a 0.11 s nano clip took up to 9.9 s beside other work.
    torch_threads: int = 1

    def __post_init__(self) -> None:
        dtypes = ("checkpoint", "float32", "bfloat16")
        _require(self.dtype in dtypes, "precision.dtype", " or ".join(dtypes), self.dtype, "use precision=exact")
        ok = self.kernels == "reference"
        _require(ok, "precision.kernels", "reference", self.kernels, "fused kernels do not exist yet")
        _require(self.torch_threads >= 1, "precision.torch_threads", "1 or more", self.torch_threads, "use 1")


@dataclass
class ParallelConfig:
    """How many devices hold one clip."""

    name: str = "single"
    num_gpus: int = 1

    def __post_init__(self) -> None:
        _require(self.num_gpus == 1, "parallel.num_gpus", "1", self.num_gpus, "several devices a clip do not exist yet")


@dataclass
class ClusterConfig:
    """Where workers run, and at what rate they are assumed to compute until a calibration says better."""

    name: str = "in_process"
    # in_process: one worker on a thread of the driver. ray: worker processes on the cluster that RAY_ADDRESS names, or
    # on a Ray of this machine that the job starts and ends itself.
    pool: str = "in_process"
    # Of the Ray pool; left out: one for each GPU of the cluster, on CPU one for each core, never more than clips.
    num_workers: int | None = None
    # How long a worker may wait for free resources, and Ray for its start.
    start_timeout_s: float = 60.0
    # auto takes the GPU if this machine has one.
    device: str = "auto"
    # The nano model on one thread of a 2-core machine took 11 times as long as 0.05 TFLOP/s says (2026-11-20).
    assumed_cpu_tflops: float = 0.0045
    assumed_gpu_tflops: float = 400.0
    # Every node sees `output` under the same path (NFS, say), so it may be a plain path on several nodes.
    shared_output: bool = False

    def __post_init__(self) -> None:
        _require(self.device in ("auto", "cpu", "cuda"), "cluster.device", "auto, cpu or cuda", self.device, "use auto")
        pools = ("in_process", "ray")
        _require(self.pool in pools, "cluster.pool", " or ".join(pools), self.pool, "use cluster=local for Ray")
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "cluster.num_workers", "1 or more", self.num_workers, "leave it out")
            ok = self.num_workers == 1 or self.pool == "ray"
            _require(ok, "cluster.num_workers", "1 in one process", self.num_workers, "use cluster=local for more")
        _require(self.start_timeout_s > 0, "cluster.start_timeout_s", "above 0", self.start_timeout_s, "use 60")
        for name in ("assumed_cpu_tflops", "assumed_gpu_tflops"):
            _require(getattr(self, name) > 0, f"cluster.{name}", "above 0", getattr(self, name), "leave it out")


@dataclass
class Price:
    """One observed price. A figure without its source and date is not a price."""

    price_id: str = ""
    node_usd_per_hour: float = 0.0
    units_per_node: int = 1
    region: str = ""
    purchase_option: str = ""
    observed_at: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        name = f"price {self.price_id or '(unnamed)'}"
        _require(bool(self.price_id and self.source), name, "named with a source", self.source, "see conf/pricing/")
        ok = self.node_usd_per_hour >= 0
        _require(ok, f"{name}.node_usd_per_hour", "0 or more", self.node_usd_per_hour, "correct it")
        _require(self.units_per_node >= 1, f"{name}.units_per_node", "1 or more", self.units_per_node, "correct it")
        try:
            date.fromisoformat(self.observed_at)
        except ValueError as error:
            raise UsageError(f"{name}.observed_at must be a date, got {self.observed_at!r}; use YYYY-MM-DD") from error


@dataclass
class PricingConfig:
    """What a GPU costs, and what a worker on CPU costs."""

    name: str = ""
    gpu: Price = MISSING
    cpu_worker: Price = MISSING


@dataclass
class LimitsConfig:
    """Bounds that no row may pass."""

    max_side_px: int = 4096
    max_duration_s: float = 20.0


@dataclass
class RenderJob:
    """Everything `jobs.render` and `jobs.estimate` read."""

    manifest: str = "conf/demo/prompts.parquet"
    output: str = "outputs/demo"
    # Names this start of the driver; the start time and a random part if left out.
    run_id: str | None = None
    # Render only these rows, at most so many of them.
    ids: list[str] | None = None
    limit: int | None = None
    budget_usd: float | None = None
    # ISO 8601; without a zone it is UTC.
    deadline: str | None = None
    # false renders again what is committed, and checks that it comes out the same.
    resume: bool = True
    # Judge the manifest, print the plan and its cost, write nothing.
    dry_run: bool = False
    # jobs.estimate: also write the estimate as JSON to this path.
    report: str | None = None
    log_level: str = "warning"
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = MISSING
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    pricing: PricingConfig = MISSING
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        if self.limit is not None:
            _require(self.limit >= 0, "limit", "0 or more", self.limit, "leave it out to render all rows")
        if self.budget_usd is not None:
            ok = math.isfinite(self.budget_usd) and self.budget_usd >= 0
            _require(ok, "budget_usd", "a number of dollars, 0 or more", self.budget_usd, "leave it out for no limit")
        if self.run_id is not None:
            ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run_id) is not None
            _require(ok, "run_id", "letters, digits, '.', '_' and '-'", self.run_id, "leave it out for a fresh one")
        levels = ("debug", "info", "warning", "error")
        _require(self.log_level in levels, "log_level", ", ".join(levels), self.log_level, "use info")
        self.deadline_ns  # noqa: B018 - parsed here so that a bad one is refused before anything starts

    @property
    def deadline_ns(self) -> int | None:
        """The deadline in UTC nanoseconds, or None."""
        if self.deadline is None:
            return None
        try:
            at = datetime.fromisoformat(self.deadline)
        except ValueError as error:
            raise UsageError(
                f"deadline must be an ISO 8601 time, got {self.deadline!r}; use one like 2026-11-21T06:00:00+00:00"
            ) from error
        return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1e9)


@dataclass
class ReportJob:
    """Everything `jobs.report` reads."""

    run: str = MISSING
    # Attach to a running run: print its progress and rebuild the page until it ends.
    follow: bool = False
    log_level: str = "warning"


@dataclass
class StageWeightsJob:
    """Everything `jobs.stage_weights` reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    log_level: str = "warning"


@dataclass
class SubmitJob:
    """What `jobs.submit` reads itself; every other argument is one of `jobs.render`."""

    # The cluster's dashboard, such as http://host:8265.
    address: str = MISSING
    # false prints the submission id and leaves the job to itself.
    wait: bool = True
    # Ray's name for the job; a fresh one if left out.
    submission_id: str | None = None
    # Names of local environment variables that the job gets too, with their values. Nothing else is handed over.
    env: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        ok = re.fullmatch(r"https?://[^/]\S*", self.address) is not None
        _require(ok, "address", "the URL of a Ray dashboard", self.address, "give one like http://host:8265")
        if self.submission_id is not None:
            ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.submission_id) is not None
            way_out = "leave it out for a fresh one"
            _require(ok, "submission_id", "letters, digits, '.', '_' and '-'", self.submission_id, way_out)


def to_plain(value: object) -> dict[str, object]:
    """A config object as plain dicts and lists, for `run.json` and content keys."""
    return asdict(cast("DataclassInstance", value))


def from_tree(tree: DictConfig) -> object:
    """The dataclass objects of a composed tree; UsageError for a missing or wrong value."""
    try:
        return OmegaConf.to_object(tree)
    except UsageError as error:
        # OmegaConf adds its own lines to what a post-init check of ours says.
        raise UsageError(str(error).splitlines()[0]) from error
    except MissingMandatoryValue as error:
        raise UsageError(f"{error.full_key} must be given; add {error.full_key}=... to the command") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{error.full_key} {reason}; see --help") from error


def set_verbatim(tree: DictConfig, key: str, value: str | list[str]) -> None:
    """Set `key` to `value` as it stands: no override grammar, no interpolation."""

    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace("${", r"\${") if "${" in text else text

    OmegaConf.update(tree, key, [escaped(part) for part in value] if isinstance(value, list) else escaped(value))


def leaf_keys(tree: DictConfig) -> dict[str, object]:
    """Every setting of a composed tree by its dotted name, and the branches above them."""
    keys: dict[str, object] = {}

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                walk(child, f"{prefix}.{name}" if prefix else str(name))
        else:
            keys[prefix] = node

    walk(OmegaConf.to_container(tree, resolve=True), "")
    return keys


def yaml_text(tree: DictConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(tree, resolve=True)
