"""The clocks of one attempt: what its device and its host do since when, told to the ledger and to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cluster.assignment import Assignment
from pipeline.cost.meter import Meter
from pipeline.records.outcome import NS_PER_S, Timings
from pipeline.records.work import WorkItem
from pipeline.storage.assets import AssetStore


@dataclass
class Attempt:
    """The clocks of one attempt: seconds of each state of the device, and of the host's part."""

    assignment: Assignment
    meter: Meter
    now_ns: Callable[[], int]
    stem: Path
    started_ns: int
    # Bears with a store that is away, and shows signs of life meanwhile.
    store: AssetStore
    state: str = ""
    since_ns: int = 0
    spent_ns: dict[str, int] = field(default_factory=dict)
    peak_gpu_bytes: int | None = None

    @property
    def item(self) -> WorkItem:
        return self.assignment.item

    def enter(self, state: str) -> None:
        """The device begins `state`. Raises Cancelled if the attempt was called off."""
        self.assignment.beat(state)
        self.book(state)

    def book(self, state: str) -> None:
        """Count the device's time as `state` from now on."""
        self._switch(state)
        self.meter.enter(state, id=self.item.request.id, attempt=self.item.attempt)

    def leave_device(self) -> None:
        self._switch("")
        self.meter.enter("idle")

    def enter_host(self, state: str) -> None:
        self.assignment.beat(state)
        self.meter.enter_host(state, id=self.item.request.id, attempt=self.item.attempt)

    def _switch(self, state: str) -> None:
        now_ns = self.now_ns()
        if self.state:
            self.spent_ns[self.state] = self.spent_ns.get(self.state, 0) + now_ns - self.since_ns
        self.state, self.since_ns = state, now_ns

    def timings(self, encode_busy_s: float, upload_s: float) -> Timings:
        """Seconds so far; the device is done."""
        seconds = {state: spent / NS_PER_S for state, spent in self.spent_ns.items()}
        return Timings(
            queued_s=(self.started_ns - self.item.queued_ns) / NS_PER_S,
            text_encode_s=seconds.get("text_encode", 0.0),
            denoise_s=seconds.get("denoise", 0.0),
            upsample_s=seconds.get("upsample", 0.0),
            decode_s=seconds.get("decode", 0.0),
            encode_s=encode_busy_s,
            upload_s=upload_s,
            wall_s=(self.now_ns() - self.started_ns) / NS_PER_S,
        )
