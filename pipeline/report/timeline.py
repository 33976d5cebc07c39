"""The worker timeline: an SVG with one lane per worker, coloured by what it did. Ledger rows in, markup out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.report.tally import Row

# Fixed colours, readable on light and dark ground alike.
STATE_COLOURS = {
    "provisioning": "#8d6cc9",
    "weight_load": "#a286d6",
    "warm_up": "#b9a3e3",
    "text_encode": "#2aa198",
    "denoise": "#2f7ed8",
    "upsample": "#5aa2ea",
    "decode": "#2f9e5b",
    "encode": "#74b84a",
    "upload": "#b3ad2d",
    "wait": "#c98b2b",
    "idle": "#9aa5b1",
    "drain": "#7f8b98",
    "teardown": "#697480",
    "failed": "#d64545",
    "unknown": "#c45a9c",
}
WIDTH_PX = 1000
LABEL_PX = 150
LANE_PX = 20
GAP_PX = 6
AXIS_PX = 22
NUM_TICKS = 5


@dataclass
class _Bar:
    state: str
    x0: float
    x1: float
    title: str


def render_timeline(ledger: Sequence[Row]) -> str:
    """The SVG and its legend; empty if the ledger is."""
    if not ledger:
        return ""
    start_ns = min(row["t0_ns"] for row in ledger)
    span_ns = max(1, max(row["t1_ns"] for row in ledger) - start_ns)
    lanes: defaultdict[str, list[Row]] = defaultdict(list)
    for row in ledger:
        lanes[row["gpu_id"]].append(row)
    height = len(lanes) * (LANE_PX + GAP_PX) + AXIS_PX
    parts = [
        f'<svg class="timeline" viewBox="0 0 {WIDTH_PX} {height}" role="img" '
        f'aria-label="What each of {len(lanes)} workers did over {span_ns / 1e9:.1f} seconds">'
    ]
    for lane, gpu_id in enumerate(sorted(lanes)):
        y = lane * (LANE_PX + GAP_PX)
        label = gpu_id if len(gpu_id) <= 22 else gpu_id[:10] + "…" + gpu_id[-10:]
        parts.append(f'<text x="0" y="{y + LANE_PX * 0.7:.1f}">{escape(label)}<title>{escape(gpu_id)}</title></text>')
        for bar in _bars(lanes[gpu_id], start_ns, span_ns):
            colour = STATE_COLOURS.get(bar.state, STATE_COLOURS["unknown"])
            parts.append(
                f'<rect x="{bar.x0:.2f}" y="{y}" width="{bar.x1 - bar.x0:.2f}" height="{LANE_PX}" fill="{colour}">'
                f"<title>{escape(bar.title)}</title></rect>"
            )
    parts += _axis(height, span_ns)
    parts.append("</svg>")
    return "".join(parts) + _legend({row["state"] for row in ledger})


def _bars(rows: Sequence[Row], start_ns: int, span_ns: int) -> list[_Bar]:
    """A worker's intervals as bars; what is narrower than a third of a pixel joins the bar before it."""
    scale = (WIDTH_PX - LABEL_PX) / span_ns
    bars: list[_Bar] = []
    for row in sorted(rows, key=lambda row: row["t0_ns"]):
        x0, x1 = (LABEL_PX + (row[key] - start_ns) * scale for key in ("t0_ns", "t1_ns"))
        # A long run has more intervals than the picture has pixels.
        if bars and (x1 - bars[-1].x0 < 1 / 3 or (row["state"] == bars[-1].state == "idle")):
            bars[-1].x1 = max(bars[-1].x1, x1)
            continue
        clip = f", {row['id']}" if row.get("id") else ""
        bars.append(_Bar(row["state"], x0, x1, f"{row['state']}{clip}: {row['gpu_seconds']:.2f} s"))
    return bars


def _axis(height: int, span_ns: int) -> list[str]:
    marks: list[str] = []
    for tick in range(NUM_TICKS + 1):
        share = tick / NUM_TICKS
        x = LABEL_PX + (WIDTH_PX - LABEL_PX) * share
        anchor = "end" if tick == NUM_TICKS else "middle" if tick else "start"
        time = _clock(span_ns / 1e9 * share)
        marks.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{time}</text>')
    return marks


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _legend(states: set[str]) -> str:
    items = "".join(
        f'<li><i style="background:{colour}"></i>{state.replace("_", " ")}</li>'
        for state, colour in STATE_COLOURS.items()
        if state in states
    )
    return f'<ul class="legend" aria-label="Colours of the timeline">{items}</ul>'
