"""How a run is going, for a person: one line that rewrites itself on a terminal, a plain line every 10 s elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO

TERMINAL_EVERY_S = 0.25
LOG_EVERY_S = 10.0


@dataclass
class Counts:
    """Rows by what became of them so far, and what they cost. Time is the caller's, in seconds."""

    num_to_render: int
    num_skipped: int
    num_rejected: int
    num_running: int = 0
    num_rendered: int = 0
    num_failed: int = 0
    spent_usd: float = 0.0
    started_s: float = field(default_factory=time.monotonic)

    def line(self, now_s: float) -> str:
        """`rendered 3/8  running 1  failed 0 ... 12.4 clips/min  ends in 25 s  $0.0004`."""
        ended = self.num_rendered + self.num_failed
        elapsed_s = max(1e-9, now_s - self.started_s)
        parts = [f"rendered {self.num_rendered}/{self.num_to_render}", f"running {self.num_running}"]
        parts.append(f"failed {self.num_failed}")
        if self.num_skipped:
            parts.append(f"skipped {self.num_skipped}")
        if self.num_rejected:
            parts.append(f"rejected {self.num_rejected}")
        if ended:
            left_s = (self.num_to_render - ended) * elapsed_s / ended
            parts.append(f"{60 * ended / elapsed_s:.1f} clips/min")
            parts.append(f"ends in {_duration(left_s)}")
        parts.append(f"${self.spent_usd:.6f}")
        return "  ".join(parts)


class Progress:
    """Writes `Counts` to a stream as often as its kind of stream wants."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._every_s = TERMINAL_EVERY_S if self._terminal else LOG_EVERY_S
        self._shown_s = time.monotonic()

    def show(self, counts: Counts, *, last: bool = False) -> None:
        now_s = time.monotonic()
        if not last and now_s - self._shown_s < self._every_s:
            return
        self._shown_s = now_s
        line = counts.line(now_s)
        if not self._terminal:
            say(self._stream, line)
            return
        with suppress(OSError):
            # Clear to the end of the line: a shorter line must not keep the tail of a longer one.
            self._stream.write(f"\r{line}\x1b[K" + ("\n" if last else ""))
            self._stream.flush()


def say(stream: TextIO, line: str) -> None:
    """Write one line for a person. Nobody reading any more (`| head`, a tee that died) must not end a night's run."""
    with suppress(OSError):
        stream.write(line + "\n")
        stream.flush()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
