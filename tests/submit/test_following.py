"""Following a job with a cluster played by a fake: exit codes, broken connections, stops, lost clusters."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.following import Log, Patience, StopFlag, exit_code, follow
from pipeline.errors import Interrupted, PipelineError
from tests.submit.conftest import ROOT

HASTE = Patience(poll_s=0.02, silent_log_s=0.1, reconnect_s=0.01, lost_s=0.3, stop_again_s=0.1, stop_s=0.5)


def _info(status: str, code: int | None = None, error_type: str | None = None, message: str = "") -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, error_type=error_type, message=message)


@dataclass
class FakeCluster:
    """Plays `answers` one after the other, the last one for ever; the log breaks off after `break_after` characters."""

    answers: list[Any]
    log: str = "one\ntwo\nthree\n"
    break_after: int = 1000
    hang: bool = False
    stopped: int = 0
    tails: int = 0
    polls: int = 0
    after_stop: Any = field(default_factory=lambda: _info("STOPPED"))

    def get_job_info(self, job_id: str) -> Any:
        answer = self.answers[min(self.polls, len(self.answers) - 1)]
        self.polls += 1
        if isinstance(answer, Exception):
            raise answer
        return self.after_stop if self.stopped and self.after_stop else answer

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def stop_job(self, job_id: str) -> bool:
        self.stopped += 1
        if self.stopped == 1:
            raise ConnectionError("lost once")
        return True

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.tails += 1
        for start in range(0, min(len(self.log), self.break_after * self.tails), 3):
            yield self.log[start : start + 3]
        if self.hang:
            await asyncio.sleep(60)
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def _follow(cluster: FakeCluster, stop: StopFlag | None = None) -> int:
    return follow(cluster, "job-1", "http://host:8265", stop or StopFlag(), HASTE)


@pytest.mark.parametrize(
    ("info", "code"),
    [(_info("SUCCEEDED", 0), 0), *((_info("FAILED", code), code) for code in (1, 2, 3, 4, 5, 6))],
)
def test_the_renders_own_code_is_returned(info: Any, code: int) -> None:
    assert exit_code(info, "job-1") == code


@pytest.mark.parametrize(
    ("info", "code", "says"),
    [
        (_info("STOPPED"), 5, "was stopped; the same command goes on"),
        (_info("FAILED", 137), 6, "ended with code 137"),
        (_info("FAILED", -9), 6, "ended with code -9"),
        (_info("FAILED", 127, message="sh: python: not found"), 6, "could not start (127); see the end of its log"),
        (_info("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", "no space"), 6, "RUNTIME_ENV_SETUP_FAILURE): no space"),
        (_info("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", "node lost"), 6, "node lost"),
    ],
)
def test_everything_else_is_an_error_with_its_code_and_reason(info: Any, code: int, says: str) -> None:
    with pytest.raises(PipelineError, match="job job-1") as caught:
        exit_code(info, "job-1")
    assert caught.value.exit_code == code
    assert says in str(caught.value)


def test_the_status_may_be_final_later_than_the_log_ends(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = FakeCluster([_info("PENDING")] + [_info("RUNNING")] * 5 + [_info("FAILED", 3)])
    assert _follow(cluster) == 3
    assert capsys.readouterr().out == cluster.log


def test_a_log_that_breaks_off_is_printed_once_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = FakeCluster([_info("RUNNING")] * 10 + [_info("SUCCEEDED", 0)], break_after=4)
    assert _follow(cluster) == 0
    assert cluster.tails > 1
    assert capsys.readouterr().out == cluster.log


def test_a_connection_that_falls_silent_is_made_anew() -> None:
    cluster = FakeCluster([], hang=True)
    out = io.StringIO()
    log = Log(cluster, "job-1", out, HASTE)
    log.start()
    end = time.monotonic() + 5
    while cluster.tails < 3 and time.monotonic() < end:
        time.sleep(0.02)
    log.finish()
    assert cluster.tails >= 3
    assert out.getvalue() == cluster.log


def test_a_reader_that_has_gone_does_not_end_the_wait() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    log = Log(FakeCluster([]), "job-1", Closed(), HASTE)
    log.finish()


def test_short_outages_are_waited_out_and_a_long_one_is_6() -> None:
    lost: list[Any] = [ConnectionError("gone")] * 3
    assert _follow(FakeCluster([_info("RUNNING"), *lost, _info("RUNNING"), *lost, _info("SUCCEEDED", 0)])) == 0
    with pytest.raises(PipelineError, match="job job-1 may still run; look with: ray job status job-1") as caught:
        _follow(FakeCluster([_info("RUNNING"), RuntimeError("Request failed with status code 500")]))
    assert caught.value.exit_code == 6


def test_a_stop_is_asked_for_until_it_is_heard() -> None:
    cluster = FakeCluster([_info("RUNNING")])
    cluster.after_stop = None
    stop = StopFlag()
    stop.reason = "SIGTERM"
    with pytest.raises(Interrupted, match="did not stop within 0 s and may still run"):
        _follow(cluster, stop)
    assert cluster.stopped > 1


def test_a_job_that_ended_before_the_stop_keeps_its_own_code() -> None:
    stop = StopFlag()
    stop.reason = "SIGINT"
    cluster = FakeCluster([_info("RUNNING")], after_stop=_info("FAILED", 3))
    assert _follow(cluster, stop) == 3


def test_the_first_signal_asks_and_the_second_leaves_at_once() -> None:
    script = (
        "import os, signal\n"
        "from jobs.following import StopFlag\n"
        "stop = StopFlag(); stop.install('job-1')\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "assert stop.reason == 'SIGINT'\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=dict(os.environ), text=True,
                          capture_output=True, timeout=30, check=False)  # fmt: skip
    assert done.returncode == 5
    assert "SIGINT: stopping job job-1" in done.stderr and "job job-1 may still run" in done.stderr
