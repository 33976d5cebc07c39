"""A run's folder: `run.json`, the event log, the lease that says its driver lives, and tidying up after dead ones.

The lease lies in `_attempts/<run_id>/`. Whoever finds it expired may close the run's ledger and sweep its attempts.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from pipeline.errors import UsageError, WorkerLost
from pipeline.records.outcome import NS_PER_S, LedgerEntry, WorkerSeat, ledger_entry
from pipeline.storage.committer import Committer
from pipeline.storage.lease_keeper import LeaseKeeper
from pipeline.storage.leases import Lease, is_alive, read_lease
from pipeline.storage.store import Store
from pipeline.storage.tables import LedgerTable, read_ledger, write_ledger_file, write_results

# In a run's folder once another driver has closed it.
CLOSED = "closed.json"
# In a run's ledger: what another driver added when it closed the run.
TAIL = "tail-unknown.parquet"
# How often a driver writes its ledger and renews its lease. A kill loses at most this much of the ledger.
FLUSH_EVERY_S = 2.0
# In a bucket the newest event file is rewritten while it grows; past this many lines a new one is begun.
EVENTS_FILE_LINES = 2_000
# Clocks of machines and stores differ: what is swept for its age is older than all that lives by so much.
SWEEP_MARGIN_S = 600


class RunFolder:
    """The files of one run, written by the one driver that holds its lease.

    A driver that was found dead (suspended for longer than its lease, say) is fenced: its run was closed by another,
    so nothing more is written. The first method that would have raises WorkerLost, later ones do nothing. Where the
    store has no conditional puts, this driver also holds the output as its one committer.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.run_id = run_id
        self.fenced = False
        self._store = store
        self._folder = f"runs/{run_id}"
        self._lease_name = lease_name(run_id)
        self._committer = None if store.is_exclusive else Committer(store, run_id)
        self._facts: dict[str, Any] = {}
        self._ledger = LedgerTable(store, f"{self._folder}/ledger")
        # Events that a store which cannot append has yet to be given, as one file that grows until it is full.
        self._events: list[str] = []
        self._events_part = 0
        self._can_append = True

    @property
    def shown(self) -> str:
        return self._store.shown(self._folder)

    def open(self, facts: Mapping[str, Any], now_ns: int) -> None:
        """Claim the run id (and the output, if need be) and write `run.json`; UsageError if one is taken.

        The lease comes first: whatever is killed in between can be swept. From then on until `close` it is renewed.
        """
        keeper = LeaseKeeper(now_ns)
        if self._committer is not None:
            self._committer.claim(now_ns)
        self._lease = Lease(self.run_id, now_ns)
        taken = UsageError(f"run_id must be new, got {self.run_id!r}, which exists; leave run_id= out")
        self._facts = dict(facts)
        is_new = self._store.read(f"{self._folder}/run.json") is None
        if not is_new or not self._store.create(self._lease_name, self._lease.content(now_ns)):
            self._release_output()
            raise taken
        if not self._store.create(f"{self._folder}/run.json", as_json(self._facts).encode()):
            # Its driver has opened and closed it since: what is in its attempts is this lease.
            remove_attempts(self._store, self.run_id)
            self._release_output()
            raise taken
        self._keeper = keeper
        keeper.start(self._renewal(self._store.with_patience(keeper.patience)))
        # A driver that ends by an error drops its folder without closing it.
        weakref.finalize(self, keeper.let_go)

    def update(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `run.json`."""
        self._facts.update(facts)
        if self._may_write():
            self._store.write(f"{self._folder}/run.json", as_json(self._facts).encode())

    def set_workers(self, seats: list[WorkerSeat]) -> None:
        self.update({"workers": [asdict(seat) for seat in seats]})

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        """Add one line to the event log: at once on a disk, with the next `write_ledger` in a bucket."""
        line = as_json({"at_ns": now_ns, "event": event, **facts}, indent=None) + "\n"
        # In a bucket a look at the store for every event would take the driver's time; its flush looks.
        if self._can_append and self._may_write():
            self._can_append = self._store.append(f"{self._folder}/events/driver.jsonl", line)
        if not self._can_append and not self.fenced:
            self._events.append(line)

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None:
        """Make all entries so far readable and renew the lease. After an error the next call writes `closed` too."""
        self._ledger.add(closed)
        if not self._may_write():
            return
        if self._committer is not None:
            with self._fenced_by_loss():
                self._committer.renew(now_ns)
        self._ledger.flush(running)
        self._write_events()
        self._store.write(self._lease_name, self._lease.content(now_ns))

    def require_output(self, now_ns: int) -> None:
        """WorkerLost unless this driver still holds the output; for each commit where the store has no conditional
        puts. Where it has them nobody needs to hold anything."""
        if self._committer is not None:
            with self._fenced_by_loss():
                self._committer.require(now_ns)

    def write_results(self, rows: Iterable[Mapping[str, Any]], x_values: pa.Table) -> None:
        if self._may_write():
            write_results(self._store, f"{self._folder}/results", rows, x_values)

    def close(self) -> None:
        """Give the lease back and remove what is left of this run's attempts."""
        # First: a renewal that came later would make the attempts anew.
        self._keeper.stop()
        if self._may_write():
            self._write_events()
            remove_attempts(self._store, self.run_id)
            # A worker that was killed in the middle of a write left its half outside of its run's folder.
            self._store.sweep(0)
            self._release_output()

    def _may_write(self) -> bool:
        """False of a fenced run; WorkerLost when that is found out."""
        if not self.fenced and self._store.read(f"{self._folder}/{CLOSED}") is not None:
            self.fenced = True
            raise _found_dead(self.run_id)
        return not self.fenced

    def _renewal(self, store: Store) -> Callable[[int], None]:
        """What the keeper does, without a reference to this folder, which would keep a dropped one alive."""
        run_id, closed_name, lease, lease_at = self.run_id, f"{self._folder}/{CLOSED}", self._lease, self._lease_name
        committer = None if self._committer is None else self._committer.with_store(store)

        def renew(now_ns: int) -> None:
            if store.read(closed_name) is not None:
                raise _found_dead(run_id)
            if committer is not None:
                committer.renew(now_ns)
            store.write(lease_at, lease.content(now_ns))

        return renew

    @contextmanager
    def _fenced_by_loss(self) -> Iterator[None]:
        try:
            yield
        except WorkerLost:
            self.fenced = True
            raise

    def _release_output(self) -> None:
        if self._committer is not None:
            self._committer.release()

    def _write_events(self) -> None:
        if not self._events:
            return
        name = f"{self._folder}/events/driver-{self._events_part:05d}.jsonl"
        self._store.write(name, "".join(self._events).encode())
        if len(self._events) >= EVENTS_FILE_LINES:
            self._events_part += 1
            self._events = []


def _found_dead(run_id: str) -> WorkerLost:
    return WorkerLost(
        f"run {run_id} was found dead and closed by another driver while it stood still; what it committed stays, the "
        "same command goes on"
    )


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


def lease_name(run_id: str) -> str:
    return f"_attempts/{run_id}/lease.json"


def remove_attempts(store: Store, run_id: str) -> None:
    store.delete_folder(f"_attempts/{run_id}")


def close_dead_runs(store: Store, now_ns: int, cost_of: Callable[[str, int], Any], closed_by: str) -> list[str]:
    """Close every run whose lease has expired: its ledger's tail as `unknown`, its `run.json`, its attempts.

    `cost_of(price_id, duration_ns)` prices the tail. Returns the ids of the runs closed. Two drivers may do this at
    the same time: both write the same files. Also sweeps what is left of writers that no living run has.
    """
    closed = []
    oldest_ns = now_ns
    for run_id in store.folders("_attempts"):
        lease = read_lease(store, lease_name(run_id))
        if lease is None and not store.sizes(f"_attempts/{run_id}") and not store.folders(f"_attempts/{run_id}"):
            continue  # its driver is just beginning, or the store sweeps the empty folder
        # Read between two looks at the lease, which is there from before run.json until that says how the run ended:
        # a run that begins or ends at this moment is not taken for a dead one.
        was_opened = store.read(f"runs/{run_id}/run.json") is not None
        lease = read_lease(store, lease_name(run_id))
        if lease is not None and is_alive(lease, now_ns):
            oldest_ns = min(oldest_ns, int(lease.get("opened_ns", 0)))
        elif run_id != closed_by:
            if was_opened and _close_run(store, run_id, lease, now_ns, cost_of, closed_by):
                closed.append(run_id)
            remove_attempts(store, run_id)
    store.sweep(oldest_ns - SWEEP_MARGIN_S * NS_PER_S)
    return closed


def is_running(store: Store, run_id: str, now_ns: int) -> bool:
    """If the driver of this run still lives, by its lease."""
    lease = read_lease(store, lease_name(run_id))
    return lease is not None and is_alive(lease, now_ns)


def _close_run(
    store: Store,
    run_id: str,
    lease: Mapping[str, Any] | None,
    now_ns: int,
    cost_of: Callable[[str, int], Any],
    closed_by: str,
) -> bool:
    """Close one dead run, says if it was still open.

    Each step gives the same files however often and by however many drivers it is done.
    """
    facts = read_run(store, run_id)
    if facts.get("state") != "running":
        return False
    now_ns, closed_by = _claimed(store, run_id, now_ns, closed_by)
    facts.update(state="lost", closed_by_run=closed_by)
    # The driver died between its last flush and the next one that did not come.
    seen_ns = int(lease["renewed_ns"]) if lease is not None else 0
    try:
        ledger = read_ledger(store, run_id, without=TAIL)
    except UsageError as error:
        # An unreadable table (a power cut, a hand edit) must not stop every later run; it stays for a person to see.
        store.write(f"runs/{run_id}/run.json", as_json({**facts, "ledger_problem": str(error)}).encode())
        return True
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
    return True


def _claimed(store: Store, run_id: str, now_ns: int, closed_by: str) -> tuple[int, str]:
    """The moment at which the run was first found dead, and by which run; whoever says so first says it for all."""
    claim = f"runs/{run_id}/{CLOSED}"
    store.create(claim, json.dumps({"found_dead_ns": now_ns, "by_run": closed_by}).encode())
    standing = json.loads(store.read(claim) or b"")
    return int(standing["found_dead_ns"]), str(standing["by_run"])
