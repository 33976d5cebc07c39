"""How long to go on with a store that fails: exponential back-off with jitter, up to a limit.

The policy, and the one thin loop that applies it. Which errors may pass is said by the stores, which raise `MayPass`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import StorageUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
FIRST_WAIT_S = 0.2
GROWTH = 4.0
LONGEST_WAIT_S = 30.0


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


@dataclass(frozen=True)
class Patience:
    """After a failure another try begins if that is within `limit_s` of the first one's begin."""

    limit_s: float
    # Sleeps so many seconds; False says that nobody wants to wait any longer. Whoever must stop quickly, or show signs
    # of life while it waits, gives its own.
    pause: Callable[[float], bool] = _sleep

    def wait_s(self, num_failures: int, elapsed_s: float, jitter: float) -> float | None:
        """Seconds until the next try after `num_failures`, or None to give up; `jitter` scales the wait."""
        # min() before the power: after a night of failures the power alone would overflow.
        wait_s = jitter * min(FIRST_WAIT_S * GROWTH ** min(num_failures - 1, 10), LONGEST_WAIT_S)
        return wait_s if elapsed_s + wait_s < self.limit_s else None


# For probes and starts: a wrong endpoint is said after four or five tries within 10 s.
QUICK = Patience(10.0)


class MayPass(Exception):
    """A failure that may pass by itself; its text is the foreign error's."""


def keep_trying(call: Callable[[], T], patience: Patience, doing: str) -> T:
    """What `call` returns once it does not raise MayPass; StorageUnavailable when `patience` ends."""
    begin_s = time.monotonic()
    num_failures = 0
    while True:
        try:
            return call()
        except MayPass as error:
            num_failures += 1
            elapsed_s = time.monotonic() - begin_s
            wait_s = patience.wait_s(num_failures, elapsed_s, random.uniform(0.5, 1.5))
            facts = {"error": str(error), "failures": num_failures, "elapsed_s": round(elapsed_s, 1)}
            if wait_s is None:
                log.error("%s failed, giving up", doing, extra={"facts": facts})
                raise _given_up(doing, error, num_failures, elapsed_s) from error.__cause__
            log.warning(
                "%s failed, trying again in %.1f s", doing, wait_s, extra={"facts": {**facts, "wait_s": wait_s}}
            )
            if not patience.pause(wait_s):
                log.error("%s failed, told to stop waiting", doing, extra={"facts": facts})
                raise _given_up(doing, error, num_failures, elapsed_s) from error.__cause__


def _given_up(doing: str, error: MayPass, num_failures: int, elapsed_s: float) -> StorageUnavailable:
    times = "once" if num_failures == 1 else f"{num_failures} times in {elapsed_s:.0f} s"
    return StorageUnavailable(
        f"storage failed {times} while {doing}: {error}; run the same command again when it is back"
    )
