"""Following a submitted job to its end: its log, its stop, and the exit code that its status stands for.

Knows Ray's job client by its methods only, so that tests can play the cluster. Ray's own command gives 0 for a stopped
job and 1 for every failed one; the true code is in the job's `driver_exit_code`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, TextIO

from jobs.interrupts import EXIT_INTERRUPTED, STOPPING
from pipeline.errors import Interrupted, PipelineError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# The codes of the contract that a render can end with by itself.
RENDER_EXIT_CODES = range(1, 7)
MAX_MESSAGE_CHARS = 2000
# What a request to a cluster that is away, restarting or overloaded raises; requests' own errors are OSErrors.
REQUEST_ERRORS = (OSError, RuntimeError, ValueError, PipelineError)


class JobClient(Protocol):
    """The part of Ray's JobSubmissionClient that is used here."""

    def get_job_info(self, job_id: str) -> Any: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def stop_job(self, job_id: str) -> bool: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    poll_s: float = 1.0
    # A connection that says nothing for so long may have been dropped on the way, as port-forwards and balancers do.
    silent_log_s: float = 60.0
    reconnect_s: float = 2.0
    lost_s: float = 60.0
    # Ray gives the job 3 s, and a job that still waits for its start is stopped once it has started.
    stop_again_s: float = 5.0
    stop_s: float = 40.0


class StopFlag:
    """Set by the first Ctrl-C, SIGTERM or hang-up; a second one ends this process at once."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def install(self, job_id: str) -> None:
        def ask(signum: int, frame: FrameType | None) -> None:
            if self.reason is not None:
                os.write(2, f"gave up waiting; job {job_id} may still run\n".encode())
                os._exit(EXIT_INTERRUPTED)
            self.reason = signal.Signals(signum).name
            os.write(2, f"\n{self.reason}: stopping job {job_id}; once more leaves it to itself\n".encode())

        for signum in STOPPING:
            signal.signal(signum, ask)


class Log:
    """Prints a job's log as it grows, each character once, over any number of connections."""

    def __init__(self, client: JobClient, job_id: str, out: TextIO, patience: Patience) -> None:
        self._client, self._job_id, self._out, self._patience = client, job_id, out, patience
        self._shown = 0
        self._lock = threading.Lock()
        self._done = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._keep_tailing, name="job-log", daemon=True).start()

    def finish(self) -> None:
        """Print what the tail has not brought: it may be cut off, or late."""
        self._done.set()
        with suppress(*REQUEST_ERRORS):
            self._show(0, self._client.get_job_logs(self._job_id))

    def _keep_tailing(self) -> None:
        while not self._done.is_set():
            # Whatever ends a connection, the next one starts at the log's beginning, and the end is read by `finish`.
            with suppress(Exception):
                asyncio.run(self._tail())
            self._done.wait(self._patience.reconnect_s)

    async def _tail(self) -> None:
        position = 0
        lines = self._client.tail_job_logs(self._job_id)
        while not self._done.is_set():
            try:
                text = await asyncio.wait_for(anext(lines), self._patience.silent_log_s)
            except StopAsyncIteration:
                return
            self._show(position, text)
            position += len(text)

    def _show(self, position: int, text: str) -> None:
        with self._lock:
            fresh = text[max(0, self._shown - position) :]
            self._shown = max(self._shown, position + len(text))
            # Whoever read the output may have gone (`| head`): the job goes on, and so does the wait for its code.
            with suppress(OSError, ValueError):
                self._out.write(fresh)
                self._out.flush()


def follow(client: JobClient, job_id: str, address: str, stop: StopFlag, patience: Patience | None = None) -> int:
    """Print the job's log until it ends, stop it if `stop` asks so, and return the render's own exit code."""
    patience = patience or Patience()
    log = Log(client, job_id, sys.stdout, patience)
    log.start()
    info = _wait_for_end(client, job_id, address, stop, patience)
    log.finish()
    return exit_code(info, job_id)


def exit_code(info: Any, job_id: str) -> int:
    """The contract's exit code for a job that has ended; if there is more to say, raises the error with that code."""
    status, code = str(info.status), info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        raise Interrupted(f"job {job_id} was stopped; the same command goes on from here")
    if code in RENDER_EXIT_CODES:
        return int(code)
    if code is not None:
        raise PipelineError(
            f"job {job_id} ended with code {code}, which is none of the render's: it was killed "
            "(-9 or 137: out of memory, mostly) or could not start (127); see the end of its log above"
        )
    message = str(info.message or "no message").strip()[-MAX_MESSAGE_CHARS:]
    raise PipelineError(f"job {job_id} failed outside the render ({info.error_type}): {message}")


def _wait_for_end(client: JobClient, job_id: str, address: str, stop: StopFlag, patience: Patience) -> Any:
    lost_since: float | None = None
    first_asked = last_asked = 0.0
    how = f"may still run; look with: ray job status {job_id} --address {address}"
    while True:
        now = time.monotonic()
        if stop.reason is not None and now - last_asked > patience.stop_again_s:
            first_asked, last_asked = first_asked or now, now
            with suppress(*REQUEST_ERRORS):
                client.stop_job(job_id)
        try:
            info = client.get_job_info(job_id)
            lost_since = None
            if str(info.status) in ENDED:
                return info
        except REQUEST_ERRORS as error:
            lost_since = lost_since or now
            if time.monotonic() - lost_since > patience.lost_s:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise PipelineError(
                    f"no answer from {address} for {patience.lost_s:.0f} s ({reason}); job {job_id} {how}"
                ) from error
        if first_asked and time.monotonic() - first_asked > patience.stop_s:
            raise Interrupted(f"job {job_id} did not stop within {patience.stop_s:.0f} s and {how}")
        _sleep(patience.poll_s, stop)


def _sleep(seconds: float, stop: StopFlag) -> None:
    """Sleep, but not on through a signal: a handler must not touch a lock, so it cannot wake a waiting thread."""
    reason, end = stop.reason, time.monotonic() + seconds
    while stop.reason == reason and time.monotonic() < end:
        time.sleep(min(0.1, seconds))
