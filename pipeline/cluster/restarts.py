"""What follows when a worker is lost before it was ready: the job's end, or another worker after a while.

Pure: the caller supplies the time, in seconds of a clock that never goes back.
"""

from __future__ import annotations

from pipeline.errors import PipelineError, UsageError

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class Restarts:
    """The losses of a run's workers before they were ready."""

    def __init__(self) -> None:
        self._any_was_ready = False
        self._wait_s = self._resume_s = 0.0

    def worker_ready(self) -> None:
        """Workers can be set up: whatever is missing may be started at once."""
        self._any_was_ready = True
        self._wait_s = self._resume_s = 0.0

    def worker_lost(self, now_s: float) -> None:
        """The wait doubles from loss to loss; workers that are lost while it lasts were started before it."""
        if now_s < self._resume_s:
            return
        self._wait_s = min(max(FIRST_WAIT_S, 2 * self._wait_s), LONGEST_WAIT_S)
        self._resume_s = now_s + self._wait_s

    def may_start(self, now_s: float) -> bool:
        return now_s >= self._resume_s

    def ends_job(self, error: BaseException, *, others_start: bool) -> bool:
        """If what a worker met in its set-up says that no worker can be set up.

        Wrong input is wrong for all. What is no error of ours may be one node's fault (a broken GPU), or a bug that
        meets every worker: a bug, if none was ever ready and none is left on the way to it.
        """
        if isinstance(error, PipelineError):
            return isinstance(error, UsageError)
        return not self._any_was_ready and not others_start
