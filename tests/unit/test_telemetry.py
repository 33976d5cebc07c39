"""Log lines say which worker and row they are about."""

from __future__ import annotations

import json
import logging

from pipeline.telemetry import JsonLines, log_about


def test_a_line_carries_what_its_thread_is_about_and_no_more_afterwards() -> None:
    record = logging.LogRecord("pipeline.x", logging.WARNING, "x.py", 1, "slow", (), None)
    with log_about(worker="cpu-1"), log_about(id="row-7", attempt=2):
        line = json.loads(JsonLines().format(record))
    assert (line["worker"], line["id"], line["attempt"]) == ("cpu-1", "row-7", 2)
    assert "id" not in json.loads(JsonLines().format(record))
