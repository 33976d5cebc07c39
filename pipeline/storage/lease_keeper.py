"""Renewing a run's leases beside its driver, which may be busy for longer than they last.

A million rows of results, compaction, or a store that is away for minutes would else make a healthy run look dead from
another machine. What a lease is, and who takes over an expired one, is in `leases.py`, `committer.py` and `runs.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pipeline.errors import PipelineError, WorkerLost
from pipeline.storage.patience import Patience

log = logging.getLogger(__name__)

# A third of a lease: it outlives two renewals that failed.
RENEW_EVERY_S = 10.0


class LeaseKeeper:
    """A thread that calls `renew(now_ns)` every RENEW_EVERY_S until it is stopped, or is told by WorkerLost to stop.

    Other storage errors are logged: the store may be back for the next renewal. `opened_ns` is the time in UTC
    nanoseconds at which the keeper was made; it counts on from there by a clock that nobody sets.
    """

    def __init__(self, opened_ns: int) -> None:
        self._opened_ns = opened_ns
        self._since_ns = time.monotonic_ns()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # A store that is away is asked again until the next renewal is due, but not once nobody waits for an answer.
        self.patience = Patience(RENEW_EVERY_S, lambda wait_s: not self._stopped.wait(wait_s))

    def start(self, renew: Callable[[int], None]) -> None:
        self._thread = threading.Thread(target=self._keep, args=(renew,), name="lease-keeper", daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        """Renew no more, without waiting for a renewal that goes on at this moment."""
        self._stopped.set()

    def stop(self) -> None:
        """Renew no more: nothing is written after this returns."""
        self.let_go()
        if self._thread is not None:
            self._thread.join()

    def _keep(self, renew: Callable[[int], None]) -> None:
        while not self._stopped.wait(RENEW_EVERY_S):
            try:
                renew(self._opened_ns + time.monotonic_ns() - self._since_ns)
            except WorkerLost as error:
                log.warning("leases are renewed no more: %s", error)
                return
            except PipelineError as error:
                log.warning("leases were not renewed, trying again in %g s: %s", RENEW_EVERY_S, error)
