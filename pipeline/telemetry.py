"""Structured log lines, what they are about, and the stage callback. Standard library only: every floor may use it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Called with the name of the state that a worker's device enters ("denoise", "decode", ...). The names are
# those of the ledger (README, "The contract"); whoever accounts for time supplies the function.
OnStage = Callable[[str], None]
# Called with such a state's name, how many of its steps are done, and of how many. It may raise to end the work.
OnStep = Callable[[str, int, int], None]


def ignore_steps(stage: str, step: int, num_steps: int) -> None:
    """An `OnStep` for those who need no progress."""


# What every log line of this thread is about: the worker, and the row it works for.
_about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


@contextmanager
def log_about(**facts: Any) -> Iterator[None]:
    """Within the `with`, each log line of this thread also carries `facts`."""
    token = _about.set({**(_about.get() or {}), **facts})
    try:
        yield
    finally:
        _about.reset(token)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and whatever was passed as `extra={"facts": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_about.get() or {})
        line.update(getattr(record, "facts", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(*, level: str) -> None:
    """Send the project's log lines to stderr as JSON; third-party loggers stay at warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger("pipeline")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
