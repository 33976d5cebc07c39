"""What each job reads from its command line."""

from __future__ import annotations

import builtins
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from omegaconf import MISSING

from pipeline.config.checks import require
from pipeline.config.cluster import ClusterConfig, PricingConfig
from pipeline.config.model import ModelConfig, PrecisionConfig
from pipeline.config.parallel import ParallelConfig, require_layout_fits
from pipeline.config.recipe import RecipeConfig
from pipeline.errors import UsageError


@dataclass
class LimitsConfig:
    """Bounds that no row may pass."""

    max_side_px: int = 4096
    max_duration_s: float = 20.0


@dataclass
class StorageConfig:
    """How long the output's store may fail or be silent."""

    # A clip, its record and the ledger are written again and again for so long before the job gives up.
    patience_s: float = 600.0
    # A request to a bucket ends when nothing moves for so long; a slow transfer goes on.
    answer_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        require(self.patience_s >= 0, "storage.patience_s", "0 or more", self.patience_s, "use 600")
        require(self.answer_timeout_s > 0, "storage.answer_timeout_s", "above 0", self.answer_timeout_s, "use 10")


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
    # End the job, resumable, when more rows than these have failed; no limit if left out.
    max_failed_rows: int | None = None
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
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if self.limit is not None:
            require(self.limit >= 0, "limit", "0 or more", self.limit, "leave it out to render all rows")
        if self.budget_usd is not None:
            ok = math.isfinite(self.budget_usd) and self.budget_usd >= 0
            require(ok, "budget_usd", "a number of dollars, 0 or more", self.budget_usd, "leave it out for no limit")
        if self.max_failed_rows is not None:
            require(self.max_failed_rows >= 0, "max_failed_rows", "0 or more", self.max_failed_rows, "leave it out")
        if self.run_id is not None:
            ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run_id) is not None
            require(ok, "run_id", "letters, digits, '.', '_' and '-'", self.run_id, "leave it out for a fresh one")
        levels = ("debug", "info", "warning", "error")
        require(self.log_level in levels, "log_level", ", ".join(levels), self.log_level, "use info")
        require_layout_fits(self.parallel, self.model.size, self.recipe, self.precision, self.cluster)
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
    # Print the files of the model's sources with their sizes, and fetch nothing.
    list: bool = False
    # Adapters and camera moves to fetch as well, by name; [all] for all. (Within this class `list` is the field above.)
    extras: builtins.list[str] = field(default_factory=builtins.list)
    log_level: str = "warning"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.extras) - self.model.extras().keys() - {"all"})
        names = ", ".join([*self.model.extras(), "all"])
        require(not unknown, "extras", f"names of {self.model.name}'s adapters and cameras", unknown, f"use {names}")

    @property
    def chosen_extras(self) -> dict[str, str]:
        """The files of `extras` by name."""
        available = self.model.extras()
        return available if "all" in self.extras else {name: available[name] for name in self.extras}


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
        require(ok, "address", "the URL of a Ray dashboard", self.address, "give one like http://host:8265")
        if self.submission_id is not None:
            ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.submission_id) is not None
            way_out = "leave it out for a fresh one"
            require(ok, "submission_id", "letters, digits, '.', '_' and '-'", self.submission_id, way_out)


@dataclass
class BenchJob:
    """What `jobs.bench` reads itself; `clip` and `batch` hand every other argument to `jobs.render`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    # Where the model's files are written or lie; the model's own folder if left out. `write`, `clip`, `batch` only.
    folder: str | None = None
    output: str = "outputs/bench"
    # Of `clip`, `batch` and `encode`.
    width: int = 1920
    height: int = 1088
    num_frames: int = 121
    # Of `batch`.
    num_clips: int = 32
    # The worker may use so much of its GPU's memory (1e9 bytes); no bound if left out. In `latency` one contestant at a
    # time.
    gpu_memory_limit_gb: float | None = None
    # Of `step`, `profile`, `gang`, `decode`, `kernel` and `latency`: width x height x frames; if left out 768x512x121
    # and 1920x1088x121, the latter alone in `latency`.
    shapes: list[str] | None = None
    # Of `latency`: timed clips of natural pictures; of noise there is one. Of `step`: turns of two timed steps.
    repeats: int = 3
    # Of `step`, `profile`, `gang` and `latency`: who takes part; the tiers and, of `step` and `gang`, the peers if left
    # out. Of `decode`: the ways beside `whole`; all if left out.
    contestants: list[str] | None = None
    # Of `gang`: how a clip is spread over GPUs of this host.
    layouts: list[str] = field(default_factory=lambda: ["ulysses2", "ring2", "tensor2"])
    # A folder; each kind of measurement adds its rows to a file of its name.
    results: str = "tests/bench/results"

    def __post_init__(self) -> None:
        require(self.num_clips >= 1, "num_clips", "1 or more", self.num_clips, "use 32")
        require(self.repeats >= 1, "repeats", "1 or more", self.repeats, "use 3")
