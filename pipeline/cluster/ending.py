"""What ends a run early, and what is left when the driver's loop has ended: rows, books, and the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.cost.allocation import Charges
from pipeline.errors import PipelineError


@dataclass
class StopRequest:
    """Set by a signal handler or a notice; the loop looks at it between two ticks.

    For `notice_s` seconds after it was seen, clips that are predicted to end by then may go on.
    """

    reason: str | None = None
    notice_s: float = 0.0


@dataclass
class Ending:
    """How the loop ended: the rows that changed, why it stopped early (if it did), and the ledger summed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rendered_attempts: dict[str, int] = field(default_factory=dict)
    # Attempts (id, number) that gave no clip of ours, and why.
    wasted: dict[tuple[str, int], str] = field(default_factory=dict)
    charges: Charges = field(default_factory=Charges)
    stopped_by: PipelineError | None = None
    limit_reached: str | None = None
