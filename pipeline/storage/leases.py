"""Leases: files that say which process holds something, and until when unless it says so again.

Who stands beside the holder sees its end at once; elsewhere it is believed until the lease runs out.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

from pipeline.records.outcome import NS_PER_S
from pipeline.storage.processes import place, start_ticks
from pipeline.storage.store import Store

LEASE_S = 30


class Lease:
    """The lease of one holder. `content` differs for every holder, so that a store can tell whose a file is."""

    def __init__(self, run_id: str, opened_ns: int) -> None:
        pid = os.getpid()
        self._facts = {
            "run_id": run_id, "token": uuid.uuid4().hex, "opened_ns": opened_ns,
            "place": place(), "pid": pid, "start": start_ticks(pid),
        }  # fmt: skip

    def content(self, now_ns: int) -> bytes:
        return json.dumps({**self._facts, "renewed_ns": now_ns, "expires_ns": now_ns + LEASE_S * NS_PER_S}).encode()

    def is_this(self, other: Mapping[str, Any] | None) -> bool:
        return other is not None and other.get("token") == self._facts["token"]


def read_lease(store: Store, name: str) -> dict[str, Any] | None:
    """The facts of a lease; None if there is none that can be read."""
    try:
        return dict(json.loads(store.read(name) or b""))
    except ValueError:
        return None


def is_alive(lease: Mapping[str, Any], now_ns: int) -> bool:
    """If the holder of the lease lives, as far as can be seen from here."""
    if lease.get("place") == place():
        return start_ticks(int(lease["pid"])) == lease.get("start") is not None
    return now_ns < int(lease.get("expires_ns", 0))
