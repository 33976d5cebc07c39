"""The report page: nothing of a user's text becomes markup, links lead to the clips, and nothing is fetched."""

from __future__ import annotations

from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.report.page import MAX_CLIPS, Showcase, relative_link, render_page
from pipeline.report.summary import summarise
from pipeline.report.timeline import render_timeline

Row = dict[str, Any]
ROOT = "file:///x/out"
RUN: Row = {
    "run_id": "r1",
    "state": "finished",
    "exit_code": 0,
    "started_at": "2026-11-20T08:00:00+00:00",
    "finished_at": "2026-11-20T08:02:00+00:00",
    "model": "nano",
    "recipe": "draft",
    "precision": "exact",
    "manifest": "/data/shots.parquet",
    "output": ROOT,
    "totals": {},
    "workers": [{}],
    "versions": {"av": "18.1.0"},
}
VOID = {"meta", "link", "input", "br", "img"}


def clip(id_: str, status: str = "rendered", **facts: Any) -> Row:
    row: Row = {
        "id": id_,
        "status": status,
        "uri": f"{ROOT}/videos/{id_}.mp4",
        "thumbnail_uri": f"{ROOT}/thumbnails/{id_}.jpg",
        "prompt": "a fox in snow",
        "seed": 7,
        "width": 96,
        "height": 64,
        "num_frames": 9,
        "fps": 24.0,
        "duration_s": 0.375,
        "wall_s": 2.5,
        "cost_usd": 0.000123,
        "rendered_by_run": "r0",
        "tags": [("team", "film")],
    }
    return row | facts


def row_without_clip(id_: str, status: str, message: str | None = None) -> Row:
    error = {"error_class": "EngineFault", "error_message": message}
    return {"id": id_, "status": status, "uri": None, "tags": {}} | error


def entry(state: str, t0_ns: int, t1_ns: int, gpu_id: str = "g0", id_: str | None = None) -> Row:
    return {
        "gpu_id": gpu_id,
        "state": state,
        "id": id_,
        "attempt": 1 if id_ else None,
        "t0_ns": t0_ns,
        "t1_ns": t1_ns,
        "gpu_seconds": (t1_ns - t0_ns) / 1e9,
        "cost_usd": Decimal("0.01"),
    }


class Markup(HTMLParser):
    """All elements with their attributes, all text, and whether every element was closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(results: list[Row], ledger: list[Row] | None = None, **run: Any) -> str:
    facts = RUN | run
    showcase = Showcase()
    summary = summarise(showcase.noting({"row_index": i, **row} for i, row in enumerate(results)), ledger or [], facts)
    return render_page(facts, summary, showcase.clips(), ledger or [])


def test_text_of_users_never_becomes_markup() -> None:
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    rows = [
        clip("a", prompt=evil, tags={evil: evil}, recipe=evil),
        clip(evil, uri=f"{ROOT}/videos/{evil}.mp4"),
        row_without_clip(evil, "failed", evil),
    ]
    ledger = [entry("denoise", 0, 10**9, gpu_id=evil, id_=evil)]
    page = page_of(rows, ledger, model=evil, manifest=evil, versions={evil: evil})
    markup = Markup(page)
    assert len(markup.all("script")) == 1
    assert markup.all("img") == []
    assert not any("onerror" in attributes for _, attributes in markup.elements)
    assert page.count("alert('x')") == 0
    assert evil in markup.text


def test_videos_and_posters_are_linked_relative_to_the_report(tmp_path: Path) -> None:
    name = "shot 3#50%ü?.0123456789ab"
    video, thumbnail = tmp_path / "videos" / f"{name}.mp4", tmp_path / "thumbnails" / f"{name}.jpg"
    report = tmp_path / "runs" / "r1" / "report.html"
    row = clip("shot", uri=video.as_uri(), thumbnail_uri=thumbnail.as_uri())
    (player,) = Markup(page_of([row], output=tmp_path.as_uri())).all("video")
    for link, target in ((player["src"], video), (player["data-poster"], thumbnail)):
        assert link is not None and link.startswith("../../") and "#" not in link and "?" not in link
        assert (report.parent / unquote(link)).resolve() == target.resolve()


@pytest.mark.parametrize(
    ("uri", "root", "link"),
    [
        ("file:///x/out/videos/a.mp4", "file:///x/out", "../../videos/a.mp4"),
        ("s3://farm/out/videos/a b.mp4", "s3://farm/out", "../../videos/a%20b.mp4"),
        ("s3://farm/out/videos/a%20b.mp4", "s3://farm/out", "../../videos/a%2520b.mp4"),
        ("file:///x/output/videos/a.mp4", "file:///x/out", "file:///x/output/videos/a.mp4"),
        ("javascript:alert(1)", "file:///x/out", ""),
    ],
)
def test_links_stay_inside_the_output_or_name_the_whole_uri(uri: str, root: str, link: str) -> None:
    assert relative_link(uri, root) == link


def test_output_given_as_a_path_or_with_a_slash_is_the_same_root() -> None:
    for output in ("/x/out", "/x/out/", "file:///x/out/"):
        (player,) = Markup(page_of([clip("a")], output=output)).all("video")
        assert player["src"] == "../../videos/a.mp4"


def test_page_fetches_nothing_and_loads_no_video_before_it_is_played() -> None:
    markup = Markup(page_of([clip("a"), clip("b", "skipped")], [entry("denoise", 0, 10**9, id_="a")]))
    assert all("src" not in attributes for attributes in markup.all("script"))
    assert [attributes["href"] for attributes in markup.all("link")] == ["data:,"]
    for player in markup.all("video"):
        assert player["preload"] == "none"
        # A poster in `poster` would be fetched for all 2,000 clips at once.
        assert "poster" not in player
        assert player["aria-label"]


def test_gallery_shows_rendered_and_skipped_clips_and_no_others() -> None:
    rows = [
        clip("a"),
        clip("b", "skipped"),
        row_without_clip("c", "failed", "NaN"),
        row_without_clip("d", "not_started"),
    ]
    markup = Markup(page_of(rows))
    assert [attributes["aria-label"] for attributes in markup.all("video")] == ["Clip a", "Clip b"]
    cards = [attributes for attributes in markup.all("li") if attributes.get("class") == "clip"]
    assert [card["data-status"] for card in cards] == ["rendered", "skipped"]
    for part in ("a fox in snow", "96x64, 9 frames", "0.38 s at 24 fps", "2.50 s", "$0.000123", "team=film"):
        assert part in markup.text


def test_failures_show_their_whole_message_and_every_id() -> None:
    message = "row 418: num_frames must be 8k+1, got 120; use 113 or 121\n" + "long " * 200 + "end"
    rows = [row_without_clip(f"id-{i}", "failed", message) for i in range(30)] + [row_without_clip("z", "not_started")]
    markup = Markup(page_of(rows, exit_code=3))
    assert message in markup.text
    assert all(f"id-{i}" in markup.text for i in range(30))
    assert "1 not started" in markup.text
    assert "Exit code 3: finished, with rows rejected or failed." in markup.text


def test_page_of_a_run_that_has_just_begun_is_whole() -> None:
    markup = Markup(page_of([], state="running", exit_code=None, finished_at=None))
    assert "running" in markup.text and "No clip yet." in markup.text and "Exit code" not in markup.text


def test_estimated_prices_are_marked() -> None:
    assert "estimated" in Markup(page_of([], estimated=True)).text
    assert "estimated" not in Markup(page_of([])).text


def test_timeline_has_a_lane_a_worker_and_a_bar_an_interval() -> None:
    second = 10**9
    ledger = [
        entry("weight_load", 0, second),
        entry("denoise", second, 3 * second, id_="a"),
        entry("idle", 0, 3 * second, gpu_id="g1"),
    ]
    markup = Markup(render_timeline(ledger))
    bars = markup.all("rect")
    assert [float(bar["width"] or 0) for bar in bars] == pytest.approx([850 / 3, 1700 / 3, 850], abs=0.01)
    assert len({bar["y"] for bar in bars}) == 2
    assert len({bar["fill"] for bar in bars}) == 3
    assert "denoise, a: 2.00 s" in markup.text


def test_timeline_of_a_long_run_has_no_more_bars_than_pixels_can_show() -> None:
    ledger = [entry("denoise" if i % 2 else "decode", i * 1000, (i + 1) * 1000) for i in range(50_000)]
    assert len(Markup(render_timeline(ledger)).all("rect")) <= 4 * 850


def test_page_of_two_thousand_clips_stays_small() -> None:
    page = page_of([clip(f"shot-{i}") for i in range(2000)])
    assert len(page) < 4_000_000
    assert "content-visibility: auto" in page


def test_page_of_many_clips_shows_what_this_run_rendered_first_and_says_how_many_there_are() -> None:
    old = [clip(f"old-{i}", "skipped") for i in range(MAX_CLIPS + 10)]
    page = page_of([*old[:50], clip("new-1"), *old[50:], clip("new-2")])
    cards = [attributes["aria-label"] for attributes in Markup(page).all("video")]
    assert len(cards) == MAX_CLIPS
    assert cards[50] == "Clip new-1" and cards[-1] == "Clip new-2"
    assert "2,000 of 2,012 clips" in page and "results/*.parquet" in page


def test_page_of_many_rejections_names_the_first_and_counts_the_others() -> None:
    rows = [row_without_clip(f"id-{i}", "rejected", f"row {i}: prompt must not be blank") for i in range(5_000)]
    rows += [row_without_clip(f"same-{i}", "failed", "NaN") | {"error_class": "Other"} for i in range(5_000)]
    page = page_of(rows)
    assert len(page) < 100_000
    assert "row 49: prompt" in page and "row 50: prompt" not in page and "4,950" in page
    assert "same-49 and 4,950 more" in page
