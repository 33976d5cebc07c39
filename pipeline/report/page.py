"""One self-contained HTML page about a run: gallery, failures, cost, stage times, workers over time.

A pure function from rows to text: no file is read or written, nothing is fetched by the page. Videos and thumbnails
are linked relative to `runs/<run_id>/report.html`, so the page works from disk and from a bucket alike. Counting is
in `summary.py`, looks are in `style.py`, the picture of the workers is in `timeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pipeline.report.style import CSS, JS
from pipeline.report.summary import RunSummary, Spend, show_usd
from pipeline.report.tally import ErrorMessage, as_decimal
from pipeline.report.timeline import render_timeline

Row = dict[str, Any]

# From runs/<run_id>/report.html to the output's root.
ROOT = "../../"
# Of links to clips outside the output; anything else, such as javascript:, is shown without a link.
LINKED_SCHEMES = ("file://", "https://", "http://", "s3://", "gs://")
# Cards of one page: a browser shows so many at ease, in 4 MB.
MAX_CLIPS = 2_000
# Tags may be as many as clips.
MAX_TAGS = 20
STATUS_TONES = {"rendered": "good", "skipped": "still", "rejected": "warn", "failed": "bad", "not_started": "still"}
CARD_STAGES = ("text_encode_s", "denoise_s", "upsample_s", "decode_s", "encode_s", "upload_s")


def render_page(
    run: Row, summary: RunSummary, clips: Sequence[Row], ledger: list[Row], *, output_uri: str | None = None
) -> str:
    """The page as text (UTF-8). `run` is the dict of run.json, rows are as in the contract's tables.

    `clips` are the rows to show (`Showcase`), `summary` counts all of them.
    `output_uri` is the output's root, under which the clips lie; run["output"] if left out.
    """
    root = _root_uri(output_uri if output_uri is not None else str(run.get("output") or ""))
    title = escape(f"Run {summary.run_id}")
    sections = (
        _tiles(summary),
        _gallery(clips, root, num_clips=summary.status_counts["rendered"] + summary.status_counts["skipped"]),
        _failures(summary),
        _section("Cost and time", f'<div class="columns">{_costs(summary)}{_unit_costs(summary)}</div>'),
        _section("Stages", _stages(summary)),
        _section("Workers", _panel(render_timeline(ledger))),
        _footer(run),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{CSS}</style></head>\n<body>'
        f"{_header(run, summary)}<main>{''.join(sections)}</main><script>{JS}</script></body></html>\n"
    )


def relative_link(uri: str, root_uri: str) -> str:
    """Link from the report to a file: relative if it lies under the root, else the URI; "" if unsafe to link."""
    if root_uri and uri.startswith(root_uri + "/"):
        inner = uri[len(root_uri) + 1 :]
        # file: URIs are percent-encoded already, names in buckets are not.
        return ROOT + quote(unquote(inner) if uri.startswith("file://") else inner)
    return uri if uri.startswith(LINKED_SCHEMES) else ""


def _root_uri(output: str) -> str:
    if output and "://" not in output:
        output = Path(output).absolute().as_uri()
    return output.rstrip("/")


def _header(run: Row, summary: RunSummary) -> str:
    facts = {
        "Started": _when(run.get("started_at")),
        "Finished": _when(run.get("finished_at")),
        "Took": _seconds(summary.elapsed_s),
        "Model": _named(run.get("model")),
        "Recipe": _named(run.get("recipe")),
        "Precision": _named(run.get("precision")),
        "Manifest": _named(run.get("manifest")),
        "Output": run.get("output"),
        "Prices": "estimated" if _is_estimated(run) else None,
    }
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v)
    code = summary.exit_code
    tone = "still" if code is None else "good" if code == 0 else "warn" if code in (3, 4, 5) else "bad"
    meaning = "" if code is None else f" Exit code {code}: {escape(summary.exit_meaning)}."
    return (
        f"<header><div><h1>Run {escape(summary.run_id)}</h1>"
        f'<p><span class="pill {tone}">{escape(summary.state)}</span>{meaning}</p>'
        f'<dl class="facts">{listed}</dl></div></header>'
    )


def _is_estimated(run: Row) -> bool:
    return bool(run.get("estimated") or (run.get("totals") or {}).get("estimated"))


def _named(value: object) -> str:
    """A name out of run.json, which holds either the name or an object that has one."""
    if isinstance(value, dict):
        return str(value.get("name") or value.get("uri") or value.get("path") or "")
    return "" if value is None else str(value)


def _tiles(summary: RunSummary) -> str:
    tiles = [
        f'<div class="tile"><strong class="{STATUS_TONES[status]}">{count:,}</strong>{status.replace("_", " ")}</div>'
        for status, count in summary.status_counts.items()
    ]
    more = {
        "seconds of video": f"{summary.video_s:,.2f}",
        "in all": show_usd(summary.costs.total.cost_usd),
        "clips a minute": None if summary.clips_per_minute is None else f"{summary.clips_per_minute:,.2f}",
        "video seconds per worker second": _figure(summary.video_s_per_worker_s),
    }
    tiles += [f'<div class="tile"><strong>{v}</strong>{k}</div>' for k, v in more.items() if v is not None]
    return f'<div class="tiles">{"".join(tiles)}</div>'


class Showcase:
    """The clips that a page can show of a run: what this run rendered comes before what was there already."""

    def __init__(self) -> None:
        self._clips: dict[str, list[Row]] = {"rendered": [], "skipped": []}

    def noting(self, results: Iterable[Row]) -> Iterator[Row]:
        """The same rows, looked at in passing."""
        for row in results:
            clips = self._clips.get(row["status"])
            if clips is not None and len(clips) < MAX_CLIPS and row.get("uri"):
                clips.append(row)
            yield row

    def clips(self) -> list[Row]:
        """In the order of the manifest, `MAX_CLIPS` at most."""
        chosen = [*self._clips["rendered"], *self._clips["skipped"]][:MAX_CLIPS]
        return sorted(chosen, key=lambda row: int(row["row_index"]))


def _gallery(clips: Sequence[Row], root: str, num_clips: int) -> str:
    if not clips:
        return _section("Clips", '<p class="soft">No clip yet.</p>')
    note = (
        f'<p class="soft">{len(clips):,} of {num_clips:,} clips, those of this run first. All are in the results '
        "table, <code>results/*.parquet</code> beside this page.</p>"
        if len(clips) < num_clips
        else ""
    )
    filters = (
        '<div class="filters"><label>Find in id, prompt or tags<input id="filter-text" type="search"></label>'
        '<label>Status<select id="filter-status"><option value="">all</option><option>rendered</option>'
        '<option>skipped</option></select></label><span id="shown" class="soft" role="status"></span></div>'
    )
    cards = "\n".join(_card(row, root) for row in clips)
    return _section("Clips", f'{note}{filters}<ul class="gallery">{cards}</ul>')


def _card(row: Row, root: str) -> str:
    id_ = escape(str(row["id"]))
    link = escape(relative_link(str(row["uri"]), root))
    poster = escape(relative_link(str(row.get("thumbnail_uri") or ""), root))
    took = sum(row.get(stage) or 0.0 for stage in CARD_STAGES)
    tags = ", ".join(f"{k}={v}" for k, v in dict(row.get("tags") or {}).items())
    facts = {
        "Size": f"{row.get('width')}x{row.get('height')}, {row.get('num_frames')} frames",
        "Duration": f"{row.get('duration_s') or 0:.2f} s at {row.get('fps') or 0:g} fps",
        "Seed": row.get("seed"),
        "Render time": _seconds(row["wall_s"] if row.get("wall_s") is not None else took),
        "Cost": show_usd(as_decimal(row.get("cost_usd"))),
        "With overhead": show_usd(as_decimal(row.get("cost_loaded_usd"))) if row.get("cost_loaded_usd") else None,
        "Recipe": row.get("recipe"),
        "Rendered by": row.get("rendered_by_run") if row["status"] == "skipped" else None,
        "Tags": tags,
    }
    listed = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v not in (None, ""))
    # The frame keeps its place before the video's size is known, so that the page does not jump.
    ratio = f"{row.get('width') or 16} / {row.get('height') or 9}"
    return (
        f'<li class="clip" data-status="{escape(row["status"])}"><video controls preload="none" playsinline '
        f'style="aspect-ratio:{ratio}" src="{link}" data-poster="{poster}" aria-label="Clip {id_}"></video>'
        f'<div class="body"><div class="name"><h3><a href="{link}">{id_}</a></h3>'
        f'<span class="pill {STATUS_TONES[row["status"]]}">{row["status"]}</span></div>'
        f'<p class="prompt">{escape(str(row.get("prompt") or ""))}</p><dl>{listed}</dl></div></li>'
    )


def _failures(summary: RunSummary) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(group.error_class)}</th><td class="num">{message.count:,}</td>'
        f'<td><div class="message">{escape(message.text)}</div><div class="ids">{_ids(message)}</div></td></tr>'
        for group in summary.errors
        for message in group.messages
    )
    rows += "".join(
        f'<tr><th scope="row">{escape(group.error_class)}</th><td class="num">{group.num_more:,}</td>'
        "<td>rows with other messages: all are in the results table</td></tr>"
        for group in summary.errors
        if group.num_more
    )
    parts = [_panel(_table("Rows without a clip", ("Error", "#Rows", "Message and ids"), rows))] if rows else []
    not_started = summary.status_counts["not_started"]
    if not_started:
        parts.append(f'<p class="soft">{not_started:,} not started: beyond the limit, not chosen, or not reached.</p>')
    return _section("Failures and rejections", "".join(parts)) if parts else ""


def _ids(message: ErrorMessage) -> str:
    return escape(", ".join(message.ids)) + (f" and {message.num_more:,} more" if message.num_more else "")


def _costs(summary: RunSummary) -> str:
    def lines(spends: Sequence[Spend], css: str = "") -> str:
        total = summary.costs.total.cost_usd
        return "".join(
            f'<tr{css}><th scope="row">{escape(s.name.replace("_", " "))}</th><td class="num">{s.gpu_seconds:,.2f}</td>'
            f'<td class="num">{show_usd(s.cost_usd)}</td>'
            f'<td class="num">{f"{s.cost_usd / total:.1%}" if total else "-"}</td></tr>'
            for s in spends
        )

    columns = ("", "#Worker s", "#Cost", "#Share")
    total_line = lines((summary.costs.total,), ' class="total"')
    purposes = _table("Cost by purpose", columns, lines(summary.costs.by_purpose) + total_line)
    states = _table("Cost by state", columns, lines(summary.costs.by_state) + total_line)
    by_tag = summary.costs.by_tag
    caption = "Cost by tag" if len(by_tag) <= MAX_TAGS else f"Cost by tag, the dearest {MAX_TAGS} of {len(by_tag):,}"
    tags = _panel(_table(caption, columns, lines(by_tag[:MAX_TAGS]))) if by_tag else ""
    return _panel(purposes) + _panel(states) + tags


def _unit_costs(summary: RunSummary) -> str:
    costs = summary.costs
    units = (
        ("clip", costs.direct_per_clip_usd, costs.total_per_clip_usd),
        ("second of video", costs.direct_per_video_s_usd, costs.total_per_video_s_usd),
        ("megapixel-frame", costs.direct_per_megapixel_frame_usd, costs.total_per_megapixel_frame_usd),
    )
    rows = "".join(
        f'<tr><th scope="row">per {name}</th><td class="num">{show_usd(direct)}</td>'
        f'<td class="num">{show_usd(total)}</td></tr>'
        for name, direct, total in units
    )
    panels = _panel(_table("Cost per rendered unit", ("", "#Direct", "#With everything"), rows))
    if summary.estimate is None:
        return panels
    check = summary.estimate
    rows = (
        f'<tr><th scope="row">worker seconds</th><td class="num">{check.estimated_gpu_seconds:,.2f}</td>'
        f'<td class="num">{check.actual_gpu_seconds:,.2f}</td></tr><tr><th scope="row">direct cost</th>'
        f'<td class="num">{show_usd(check.estimated_cost_usd)}</td>'
        f'<td class="num">{show_usd(check.actual_cost_usd)}</td></tr>'
    )
    note = (
        f'<p class="soft">Of {check.num_clips:,} clips, actual / estimate: median {check.median_ratio:.2f}, '
        f"farthest {check.worst_ratio:.2f}.</p>"
    )
    return panels + _panel(_table("Estimate and actual", ("", "#Estimate", "#Actual"), rows) + note)


def _stages(summary: RunSummary) -> str:
    if not summary.stages:
        return '<p class="soft">No clip rendered in this run.</p>'
    longest = max(stage.total_s for stage in summary.stages) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{stage.name.replace("_", " ")}</th>'
        f'<td class="wide"><span class="bar" style="width:{stage.total_s / longest:.2%}"></span></td>'
        f'<td class="num">{stage.total_s:,.2f}</td><td class="num">{stage.p50_s:,.3f}</td>'
        f'<td class="num">{stage.p90_s:,.3f}</td><td class="num">{stage.max_s:,.3f}</td></tr>'
        for stage in summary.stages
    )
    columns = ("", "Share of the longest", "#Total s", "#Median s", "#90% within s", "#Longest s")
    return _panel(_table("Seconds by stage, rendered clips", columns, rows))


def _footer(run: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted((run.get("versions") or {}).items()))
    workers = len(run.get("workers") or [])
    return f"<footer>{workers:,} worker{'' if workers == 1 else 's'}. {escape(versions)}</footer>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _panel(body: str) -> str:
    # Focusable, so that a table wider than the screen can be scrolled with the keyboard.
    return f'<div class="panel" tabindex="0">{body}</div>' if body else ""


def _table(caption: str, columns: Sequence[str], rows: str) -> str:
    """A table; a column whose title begins with # holds numbers."""
    heads = "".join(
        f'<th scope="col"{" class=num" if title.startswith("#") else ""}>{title.removeprefix("#")}</th>'
        for title in columns
    )
    return f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _when(iso: str | None) -> str | None:
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M:%S %Z").strip() if iso else None


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.2f} s" if value < 600 else f"{value / 60:,.1f} min"


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
