"""How a run shows its progress: one line that rewrites itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from pipeline.cluster import progress
from pipeline.cluster.progress import Counts, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_line_says_what_is_done_how_fast_until_when_and_for_how_much(clock: list[float]) -> None:
    counts = Counts(10, 2, 1, num_running=1, num_rendered=4, num_failed=1, spent_usd=0.5, started_s=0.0)
    line = counts.line(30.0)
    assert line == (
        "rendered 4/10  running 1  failed 1  skipped 2  rejected 1  10.0 clips/min  ends in 30 s  $0.500000"
    )


def test_a_log_gets_a_plain_line_every_ten_seconds_and_one_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    shown, counts = Progress(stream), Counts(3, 0, 0, started_s=0.0)
    for second in range(25):
        clock[0] = float(second)
        shown.show(counts)
    shown.show(counts, last=True)
    assert len(stream.getvalue().splitlines()) == 3
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_terminal_line_rewrites_itself_and_ends_with_a_new_line(clock: list[float]) -> None:
    stream = Terminal()
    shown, counts = Progress(stream), Counts(3, 0, 0, started_s=0.0)
    for tick in range(10):
        clock[0] = tick / 10
        shown.show(counts)
    shown.show(counts, last=True)
    text = stream.getvalue()
    assert text.count("\r") == text.count("\x1b[K") >= 3
    assert text.count("\n") == 1 and text.endswith("\n")


def test_long_waits_are_in_minutes_and_hours(clock: list[float]) -> None:
    counts = Counts(1000, 0, 0, num_rendered=1, started_s=0.0)
    assert "ends in 16 h 39 min" in counts.line(60.0)
    assert "ends in 17 min" in Counts(18, 0, 0, num_rendered=1, started_s=0.0).line(60.0)


def test_a_reader_that_goes_away_does_not_end_the_run(clock: list[float]) -> None:
    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Progress(Closed()).show(Counts(3, 0, 0, started_s=0.0), last=True)
    progress.say(Closed(), "a line")
