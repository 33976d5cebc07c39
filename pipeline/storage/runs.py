"""A run's folder: `run.json`, the event log, the lease that says its driver lives, and tidying up after dead ones.

The lease lies in `_attempts/<run_id>/`. Whoever finds it expired may sweep the attempts and close the dead run's
ledger; on the same machine a driver that is gone is recognised at once, elsewhere when the lease runs out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from pipeline.errors import UsageError, WorkerLost
from pipeline.records.outcome import NS_PER_S, LedgerEntry, WorkerSeat, ledger_entry
from pipeline.storage.processes import place, start_ticks
from pipeline.storage.store import Store
from pipeline.storage.tables import LedgerTable, read_ledger, write_ledger_file, write_results

LEASE_S = 30
# In a run's folder once another driver has closed it.
CLOSED = "closed.json"
# In a run's ledger: what another driver added when it closed the run.
TAIL = "tail-unknown.parquet"
# How often a driver writes its ledger and renews its lease. A kill loses at most this much of the ledger.
FLUSH_EVERY_S = 2.0
# In a bucket the newest event file is rewritten while it grows; past this many lines a new one is begun.
EVENTS_FILE_LINES = 2_000


class RunFolder:
    """The files of one run, written by the one driver that holds its lease.

    A driver that was found dead (suspended for longer than its lease, say) is fenced: its run was closed by another,
    so it writes nothing more and `write_ledger` raises.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.run_id = run_id
        self.fenced = False
        self._store = store
        self._folder = f"runs/{run_id}"
        self._attempts = f"_attempts/{run_id}"
        self._facts: dict[str, Any] = {}
        self._ledger = LedgerTable(store, f"{self._folder}/ledger")
        # Events that a store which cannot append has yet to be given, as one file that grows until it is full.
        self._events: list[str] = []
        self._events_part = 0

    @property
    def shown(self) -> str:
        return self._store.shown(self._folder)

    def open(self, facts: Mapping[str, Any], now_ns: int) -> None:
        """Claim the run id and write `run.json`; UsageError if the id is taken.

        The lease comes first: whatever is killed in between can be swept.
        """
        taken = UsageError(f"run_id must be new, got {self.run_id!r}, which exists; leave run_id= out")
        if self._store.read(f"{self._folder}/run.json") is not None:
            raise taken
        if not self._store.create(f"{self._attempts}/lease.json", json.dumps(_lease(now_ns)).encode()):
            raise taken
        self._facts = dict(facts)
        if not self._store.create(f"{self._folder}/run.json", as_json(self._facts).encode()):
            remove_attempts(self._store, self.run_id)
            raise taken

    def update(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `run.json`."""
        self._facts.update(facts)
        if not self.fenced:
            self._store.write(f"{self._folder}/run.json", as_json(self._facts).encode())

    def set_workers(self, seats: list[WorkerSeat]) -> None:
        self.update({"workers": [asdict(seat) for seat in seats]})

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        """Add one line to the event log: at once on a disk, with the next `write_ledger` in a bucket."""
        line = as_json({"at_ns": now_ns, "event": event, **facts}, indent=None) + "\n"
        if not self._store.append(f"{self._folder}/events/driver.jsonl", line):
            self._events.append(line)

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None:
        """Make all entries so far readable and renew the lease; WorkerLost if another driver has closed this run."""
        if self.fenced:
            return
        if self._store.read(f"{self._folder}/{CLOSED}") is not None:
            self.fenced = True
            raise WorkerLost(
                f"run {self.run_id} was found dead and closed by another driver while it stood still; what it "
                "committed stays, the same command goes on"
            )
        self._ledger.add(closed)
        self._ledger.flush(running)
        self._write_events()
        self._store.write(f"{self._attempts}/lease.json", json.dumps(_lease(now_ns)).encode())

    def write_results(self, rows: Iterable[Mapping[str, Any]], x_values: pa.Table) -> None:
        write_results(self._store, f"{self._folder}/results", rows, x_values)

    def close(self) -> None:
        """Give the lease back and remove what is left of this run's attempts."""
        self._write_events()
        remove_attempts(self._store, self.run_id)

    def _write_events(self) -> None:
        if not self._events:
            return
        name = f"{self._folder}/events/driver-{self._events_part:05d}.jsonl"
        self._store.write(name, "".join(self._events).encode())
        if len(self._events) >= EVENTS_FILE_LINES:
            self._events_part += 1
            self._events = []


def as_json(value: Any, indent: int | None = 1) -> str:
    """JSON that any reader takes: a number that is not finite becomes null, what JSON has no form for becomes text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, default=str, ensure_ascii=False, allow_nan=False)


def read_run(store: Store, run_id: str) -> dict[str, Any]:
    """`run.json` of a run; UsageError if there is none."""
    try:
        return dict(json.loads(store.read(f"runs/{run_id}/run.json") or b""))
    except ValueError as error:
        where = store.uri(f"runs/{run_id}")
        raise UsageError(f"run must be a run folder with a run.json, got {where}; see <output>/runs/") from error


def read_events(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a last line that a kill cut short is left out."""
    events = []
    folder = f"runs/{run_id}/events"
    for name in sorted(store.sizes(folder)):
        for line in (store.read(f"{folder}/{name}") or b"").decode(errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def remove_attempts(store: Store, run_id: str) -> None:
    store.delete_folder(f"_attempts/{run_id}")


def close_dead_runs(store: Store, now_ns: int, cost_of: Callable[[str, int], Any], closed_by: str) -> list[str]:
    """Close every run whose lease has expired: its ledger's tail as `unknown`, its `run.json`, its attempts.

    `cost_of(price_id, duration_ns)` prices the tail. Returns the ids of the runs closed. Two drivers may do this at
    the same time: both write the same files.
    """
    closed = []
    for run_id in store.folders("_attempts"):
        lease = _read_lease(store, run_id)
        if run_id == closed_by or (lease is not None and _is_alive(lease, now_ns)):
            continue
        if store.read(f"runs/{run_id}/run.json") is not None:
            _close_run(store, run_id, lease, now_ns, cost_of, closed_by)
            closed.append(run_id)
        remove_attempts(store, run_id)
    return closed


def is_running(store: Store, run_id: str, now_ns: int) -> bool:
    """If the driver of this run still lives, by its lease."""
    lease = _read_lease(store, run_id)
    return lease is not None and _is_alive(lease, now_ns)


def _close_run(
    store: Store,
    run_id: str,
    lease: Mapping[str, Any] | None,
    now_ns: int,
    cost_of: Callable[[str, int], Any],
    closed_by: str,
) -> None:
    """Close one dead run. Each step gives the same files however often and by however many drivers it is done."""
    facts = read_run(store, run_id)
    if facts.get("state") != "running":
        return
    now_ns = _claimed_ns(store, run_id, now_ns, closed_by)
    facts.update(state="lost", closed_by_run=closed_by)
    # The driver died between its last flush and the next one that did not come.
    seen_ns = int(lease["renewed_ns"]) if lease is not None else 0
    try:
        ledger = read_ledger(store, run_id, without=TAIL)
    except UsageError as error:
        # An unreadable table (a power cut, a hand edit) must not stop every later run; it stays for a person to see.
        store.write(f"runs/{run_id}/run.json", as_json({**facts, "ledger_problem": str(error)}).encode())
        return
    seats = [WorkerSeat(**worker) for worker in facts.get("workers", [])]
    tail = []
    for index, seat in enumerate(seats):
        own = [entry for entry in ledger if (entry.node_id, entry.gpu_id) == (seat.node_id, seat.gpu_id)]
        t0_ns = max([seat.acquired_ns, *(entry.t1_ns for entry in own)])
        # A seat's release is written just before the last of its ledger, so that may be missing too.
        t1_ns = seat.released_ns
        if t1_ns is None:
            t1_ns = max(t0_ns, min(max(t0_ns, seen_ns) + round(FLUSH_EVERY_S * NS_PER_S), now_ns))
            seats[index] = replace(seat, released_ns=t1_ns)
        if t1_ns > t0_ns:
            price_id = str(facts["price_id"])
            cost_usd = cost_of(price_id, t1_ns - t0_ns)
            tail.append(ledger_entry(seat, "unknown", t0_ns, t1_ns, price_id=price_id, cost_usd=cost_usd))
    if tail:
        write_ledger_file(store, f"runs/{run_id}/ledger/{TAIL}", tail)
    facts["workers"] = [asdict(seat) for seat in seats]
    store.write(f"runs/{run_id}/run.json", as_json(facts).encode())


def _claimed_ns(store: Store, run_id: str, now_ns: int, closed_by: str) -> int:
    """The moment at which the run was first found dead; whoever says so first says it for everybody."""
    claim = f"runs/{run_id}/{CLOSED}"
    store.create(claim, json.dumps({"found_dead_ns": now_ns, "by_run": closed_by}).encode())
    return int(json.loads(store.read(claim) or b"")["found_dead_ns"])


def _read_lease(store: Store, run_id: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(store.read(f"_attempts/{run_id}/lease.json") or b""))
    except ValueError:
        return None


def _lease(now_ns: int) -> dict[str, Any]:
    """The lease of this process, with which process on which boot of which machine it is: beside it, its end can be
    seen at once."""
    pid = os.getpid()
    return {
        "renewed_ns": now_ns, "expires_ns": now_ns + LEASE_S * NS_PER_S,
        "place": place(), "pid": pid, "start": start_ticks(pid),
    }  # fmt: skip


def _is_alive(lease: Mapping[str, Any], now_ns: int) -> bool:
    if lease.get("place") == place():
        return start_ticks(int(lease["pid"])) == lease.get("start") is not None
    return now_ns < int(lease.get("expires_ns", 0))
