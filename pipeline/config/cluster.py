"""Where workers run, what their machines are like, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from omegaconf import MISSING

from pipeline.config.checks import require
from pipeline.errors import UsageError


@dataclass
class ClusterConfig:
    """Where workers run, and at what rate they are assumed to compute until a calibration says better."""

    name: str = "in_process"
    # in_process: one worker on a thread of the driver. ray: worker processes on the cluster that RAY_ADDRESS names, or
    # on a Ray of this machine that the job starts and ends itself.
    pool: str = "in_process"
    # Of the Ray pool; left out: as many as the cluster's GPUs hold, on CPU its cores, never more than clips. With
    # parallel=auto, which makes workers of several sizes, this counts GPUs.
    num_workers: int | None = None
    # GPUs of a node, on CPU cores: a layout never spans two. Left out, what the largest node says once Ray is up.
    gpus_per_node: int | None = None
    # What one GPU holds (1e9 bytes): clips that need more are spread over several. Left out, what nvidia-smi says on
    # the driver's machine; where that says nothing either, it is found out by trying.
    gpu_memory_gb: float | None = None
    # How long a worker may wait for free resources, and Ray for its start.
    start_timeout_s: float = 60.0
    # How long a worker on Ray may load its model.
    load_timeout_s: float = 1800.0
    # A worker that gives no sign of life for so long, and for five times its longest step, hangs: on Ray it is
    # replaced, in one process the job ends.
    hang_after_s: float = 60.0
    # From a signal to the end of the process; clips that are predicted to end in time go on. `ray job stop` gives 3 s.
    stop_notice_s: float = 3.0
    # auto takes the GPU if this machine has one.
    device: str = "auto"
    # The nano model on one thread of a 2-core machine took 11 times as long as 0.05 TFLOP/s says (2026-11-20).
    assumed_cpu_tflops: float = 0.0045
    # One H200, eager, cold: 31.7 s for the 7,687 TFLOP of a 1080p clip of LTX-2.0 (tests/bench/results/clip.jsonl).
    assumed_gpu_tflops: float = 242.0
    # Between two GPUs of a node. Two H200 exchanged all-to-all 128 MiB, half of which left each GPU, in 0.27 ms
    # (NVLink; 2026-11).
    assumed_link_gb_per_s: float = 249.0
    # From the start of a worker to its first clip, until workers of this run have said what it takes. Weights of 38 GB
    # take 1.3 s from memory and 19 to 25 s from a disk of 1.5 to 2 GB/s.
    assumed_load_s: float = 20.0
    # A worker may use so much of its GPU's memory (1e9 bytes) and no more, to try what a smaller GPU would hold.
    gpu_memory_limit_gb: float | None = None
    # A worker of one GPU that holds the whole model replays denoiser calls of fewer video tokens than this, all samples
    # together, as CUDA graphs; 0: none. On one H200 Python queues a step of 19B in 0.2 to 0.3 s, whatever its size; at
    # 8,160 tokens (half of 1920x1088, 121 frames) the device takes 0.43 s in bfloat16, but 0.25 s in the fast tier.
    # Clips are the same to the bit: it is no part of the content key.
    graph_below_tokens: int = 12288
    # Every node sees `output` under the same path (NFS, say), so it may be a plain path on several nodes.
    shared_output: bool = False

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), "cluster.device", "auto, cpu or cuda", self.device, "use auto")
        pools = ("in_process", "ray")
        require(self.pool in pools, "cluster.pool", " or ".join(pools), self.pool, "use cluster=local for Ray")
        if self.num_workers is not None:
            require(self.num_workers >= 1, "cluster.num_workers", "1 or more", self.num_workers, "leave it out")
            ok = self.num_workers == 1 or self.pool == "ray"
            require(ok, "cluster.num_workers", "1 in one process", self.num_workers, "use cluster=local for more")
        for name, usual in (("start_timeout_s", 60), ("load_timeout_s", 1800), ("hang_after_s", 60)):
            require(getattr(self, name) > 0, f"cluster.{name}", "above 0", getattr(self, name), f"use {usual}")
        require(self.stop_notice_s >= 3, "cluster.stop_notice_s", "3 or more", self.stop_notice_s, "use 3")
        for name in ("gpu_memory_gb", "gpu_memory_limit_gb"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, f"cluster.{name}", "above 0", limit, "leave it out")
        below = self.graph_below_tokens
        require(below >= 0, "cluster.graph_below_tokens", "0 or more", below, "0 captures none")
        per_node = self.gpus_per_node
        require(per_node is None or per_node >= 1, "cluster.gpus_per_node", "1 or more", per_node, "leave it out")
        for name in ("assumed_cpu_tflops", "assumed_gpu_tflops", "assumed_link_gb_per_s", "assumed_load_s"):
            require(getattr(self, name) > 0, f"cluster.{name}", "above 0", getattr(self, name), "leave it out")


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
        require(bool(self.price_id and self.source), name, "named with a source", self.source, "see conf/pricing/")
        ok = self.node_usd_per_hour >= 0
        require(ok, f"{name}.node_usd_per_hour", "0 or more", self.node_usd_per_hour, "correct it")
        require(self.units_per_node >= 1, f"{name}.units_per_node", "1 or more", self.units_per_node, "correct it")
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
