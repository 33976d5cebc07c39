"""The one driver that may commit to an output whose store has no conditional puts.

There two drivers that both find a name free would both write it, so one holds a lease of the whole output. It is
taken by Fischer's algorithm: see it free, write, wait longer than any write takes, hold it if one's own still stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from copy import copy
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import UsageError, WorkerLost
from pipeline.records.outcome import NS_PER_S
from pipeline.storage.leases import Lease, is_alive, read_lease
from pipeline.storage.store import Store

log = logging.getLogger(__name__)

COMMITTER = "_attempts/committer.json"
# Longer than it takes a driver from seeing the lease free to having written its own; who takes longer withdraws.
SETTLE_S = 2.0


class Committer:
    """One driver's hold on an output without conditional puts. Whoever lost it may not write there any more."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id

    def claim(self, now_ns: int) -> None:
        """Become the committer, which takes SETTLE_S; UsageError if another driver is."""
        self._lease = Lease(self._run_id, now_ns)
        begin_s = time.monotonic()
        standing = read_lease(self._store, COMMITTER)
        if standing is not None and is_alive(standing, now_ns):
            raise self._held(standing)
        took_s, standing = self._written_and_settled(begin_s, now_ns)
        if not self._lease.is_this(standing):
            raise self._held(standing)
        if took_s >= SETTLE_S:
            # Another may have found it free, and held it, before this write arrived.
            self._store.delete(COMMITTER)
            raise UsageError(
                f"output must answer within {SETTLE_S:g} s to be written without conditional puts, got "
                f"{took_s:.1f} s from {self._store.root_uri}; try again, or choose another output="
            )
        log.warning("%s has no conditional puts: run %s alone commits there", self._store.root_uri, self._run_id)

    def with_store(self, store: Store) -> Committer:
        """The same hold, seen through a store of another patience."""
        other = copy(self)
        other._store = store
        return other

    def renew(self, now_ns: int) -> None:
        """Say that this driver lives; WorkerLost if another took the output over while this one stood still."""
        standing = read_lease(self._store, COMMITTER)
        if standing is not None and not self._lease.is_this(standing):
            raise self._lost(standing)
        self._store.write(COMMITTER, self._lease.content(now_ns))

    def require(self, now_ns: int) -> None:
        """WorkerLost unless this driver holds the output now and for SETTLE_S more.

        A hold that ran out while the store was away, and that nobody took, is taken again, which takes SETTLE_S.
        """
        begin_s = time.monotonic()
        standing = read_lease(self._store, COMMITTER)
        if not self._lease.is_this(standing):
            raise self._lost(standing)
        assert standing is not None
        if int(standing["expires_ns"]) - now_ns > SETTLE_S * NS_PER_S:
            return
        took_s, standing = self._written_and_settled(begin_s, now_ns)
        if took_s >= SETTLE_S or not self._lease.is_this(standing):
            raise self._lost(standing)

    def _written_and_settled(self, begin_s: float, now_ns: int) -> tuple[float, dict[str, Any] | None]:
        """Seconds from `begin_s` until our lease was written, and the one that stands after SETTLE_S more."""
        self._store.write(COMMITTER, self._lease.content(now_ns))
        took_s = time.monotonic() - begin_s
        time.sleep(SETTLE_S)
        return took_s, read_lease(self._store, COMMITTER)

    def _lost(self, standing: Mapping[str, Any] | None) -> WorkerLost:
        by = "another driver" if standing is None or self._lease.is_this(standing) else f"run {standing['run_id']}"
        return WorkerLost(
            f"output {self._store.root_uri} was taken over by {by} while run {self._run_id} stood still; "
            "what it committed stays, the same command goes on"
        )

    def release(self) -> None:
        if self._lease.is_this(read_lease(self._store, COMMITTER)):
            self._store.delete(COMMITTER)

    def _held(self, standing: Mapping[str, Any] | None) -> UsageError:
        holder = "another run has just tried to take"
        if standing is not None:
            expires_s = int(standing["expires_ns"]) / NS_PER_S
            until = datetime.fromtimestamp(expires_s, UTC).isoformat(timespec="seconds")
            holder = f"run {standing['run_id']} holds until {until} or its end"
        return UsageError(
            f"output must have one driver at a time, as its store has no conditional puts, got {self._store.root_uri}, "
            f"which {holder}; wait, or choose another output="
        )
