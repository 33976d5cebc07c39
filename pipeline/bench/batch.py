"""What rendering a batch took, from what its run left: results, ledger and events. Pure; no torch here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench.rows import Row
from pipeline.records.outcome import IDLE_STATES, NS_PER_S, LedgerEntry


def batch_facts(
    rows: Sequence[Mapping[str, Any]], entries: Sequence[LedgerEntry], events: Sequence[Mapping[str, Any]]
) -> Row:
    """Rates from the first hand-out to the last commit; what a clip cost of itself, and with all that GPUs were held.

    `idle_share` and `share_by_state` are parts of the GPU-seconds held in that time. Of a batch in which no clip was
    rendered there are only counts, and why.
    """
    rendered = [row for row in rows if row["status"] == "rendered"]
    num_clips = len(rendered)
    facts: Row = {
        "num_rendered": num_clips,
        "error_message": next((row["error_message"] for row in rows if row["error_message"]), None),
    }
    if not rendered:
        return facts
    began_ns = min(event["at_ns"] for event in events if event["event"] == "attempt_started")
    ended_ns = max(event["at_ns"] for event in events if event["event"] == "rendered")
    wall_s = (ended_ns - began_ns) / NS_PER_S
    of_clips = [entry for entry in entries if entry.id is not None]
    shares = _share_by_state(entries, began_ns, ended_ns)
    return facts | {
        "wall_s": wall_s,
        "clips_a_minute": 60 * num_clips / wall_s,
        "video_s_per_s": sum(row["duration_s"] for row in rendered) / wall_s,
        "gpu_seconds_a_clip": sum(entry.gpu_seconds for entry in of_clips) / num_clips,
        "gpu_seconds_a_clip_loaded": sum(entry.gpu_seconds for entry in entries) / num_clips,
        "cost_usd_a_clip": float(sum(entry.cost_usd for entry in of_clips)) / num_clips,
        "cost_usd_a_clip_loaded": float(sum(entry.cost_usd for entry in entries)) / num_clips,
        "layouts": dict(Counter(row["parallel"] for row in rendered)),
        "num_gpus": len({entry.gpu_id for entry in entries}),
        "idle_share": sum(shares.get(state, 0.0) for state in IDLE_STATES),
        "share_by_state": shares,
    }


def _share_by_state(entries: Sequence[LedgerEntry], began_ns: int, ended_ns: int) -> dict[str, float]:
    """Of the time that GPUs were held between these two, the part in each state."""
    held_ns: dict[str, int] = defaultdict(int)
    for entry in entries:
        within_ns = min(entry.t1_ns, ended_ns) - max(entry.t0_ns, began_ns)
        if within_ns > 0:
            held_ns[entry.state] += within_ns
    total_ns = sum(held_ns.values())
    return {state: spent_ns / total_ns for state, spent_ns in held_ns.items()}
