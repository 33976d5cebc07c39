"""A run's folder: `run.json`, the event log, the lease that says its driver lives, and tidying up after dead ones.

The lease lies in `_attempts/<run_id>/`. Whoever finds it expired may sweep the attempts and close the dead run's
ledger; on the same machine a driver that is gone is recognised at once, elsewhere when the lease runs out.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UsageError
from pipeline.records.outcome import NS_PER_S, LedgerEntry, WorkerSeat
from pipeline.storage.filesystem import create_bytes_if_absent, create_folder, storage_error, write_atomically
from pipeline.storage.tables import LedgerTable, read_ledger, write_ledger_file

LEASE_S = 30
# How often a driver writes its ledger and renews its lease. A kill loses at most this much of the ledger.
FLUSH_EVERY_S = 2.0


class RunFolder:
    """The files of one run, written by the one driver that holds its lease."""

    def __init__(self, output: Path, run_id: str) -> None:
        self.run_id = run_id
        self.path = output / "runs" / run_id
        self.attempts = output / "_attempts" / run_id
        self._facts: dict[str, Any] = {}
        self._events: IO[str] | None = None

    def open(self, facts: Mapping[str, Any], now_ns: int) -> None:
        """Claim the run id and write `run.json`; UsageError if the id is taken or the output cannot be written."""
        create_folder(self.path.parent)
        create_folder(self.attempts.parent)
        try:
            self.attempts.mkdir(exist_ok=True)
            self.path.mkdir()
        except FileExistsError as error:
            raise UsageError(f"run_id must be new, got {self.run_id!r}, which exists; leave run_id= out") from error
        except OSError as error:
            raise storage_error(error, f"creating {self.path}") from error
        self.renew_lease(now_ns)
        self.update(facts)
        events = self.path / "events"
        events.mkdir()
        self._events = (events / "driver.jsonl").open("a", encoding="utf-8")
        self.ledger = LedgerTable(self.path / "ledger")

    def update(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `run.json`."""
        self._facts.update(facts)
        write_atomically(self.path / "run.json", json.dumps(self._facts, indent=1, default=str).encode())

    def set_workers(self, seats: list[WorkerSeat]) -> None:
        self.update({"workers": [asdict(seat) for seat in seats]})

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        """Append one line to the event log. Each line is written at once: a kill loses none that was logged."""
        assert self._events is not None
        line = json.dumps({"at_ns": now_ns, "event": event, **facts}, default=str, ensure_ascii=False)
        try:
            self._events.write(line + "\n")
            self._events.flush()
        except OSError as error:
            raise storage_error(error, "writing the event log") from error

    def renew_lease(self, now_ns: int) -> None:
        lease = {"renewed_ns": now_ns, "expires_ns": now_ns + LEASE_S * NS_PER_S, **_identity()}
        write_atomically(self.attempts / "lease.json", json.dumps(lease).encode())

    def close(self) -> None:
        """Give the lease back and remove what is left of this run's attempts."""
        if self._events is not None:
            self._events.close()
        remove_attempts(self.attempts)


def read_run(run_folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder; UsageError if it is not one."""
    try:
        facts = json.loads((run_folder / "run.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"run must be a run folder with a run.json, got {run_folder}; see <output>/runs/") from error
    return dict(facts)


def read_events(run_folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a last line that a kill cut short is left out."""
    events = []
    for file in sorted((run_folder / "events").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def remove_attempts(attempts: Path) -> None:
    shutil.rmtree(attempts, ignore_errors=True)
    with suppress(OSError):  # other runs still have attempts there
        attempts.parent.rmdir()


def close_dead_runs(output: Path, now_ns: int, cost_of: Callable[[str, int], Any], closed_by: str) -> list[str]:
    """Close every run whose lease has expired: its ledger's tail as `unknown`, its `run.json`, its attempts.

    `cost_of(price_id, duration_ns)` prices the tail. Returns the ids of the runs closed. Two drivers may do this at
    the same time: the tail has one name, created if absent.
    """
    closed = []
    for attempts in sorted((output / "_attempts").glob("*")):
        lease = _read_lease(attempts)
        if attempts.name == closed_by or (lease is not None and _is_alive(lease, now_ns)):
            continue
        run_folder = output / "runs" / attempts.name
        if (run_folder / "run.json").exists():
            _close_run(run_folder, lease, now_ns, cost_of, closed_by)
            closed.append(attempts.name)
        remove_attempts(attempts)
    return closed


def _close_run(
    run_folder: Path,
    lease: Mapping[str, Any] | None,
    now_ns: int,
    cost_of: Callable[[str, int], Any],
    closed_by: str,
) -> None:
    """Close one dead run. Each step gives the same files however often and by however many drivers it is done."""
    facts = read_run(run_folder)
    if facts.get("state") != "running":
        return
    now_ns = _claimed_ns(run_folder, now_ns, closed_by)
    # The driver died between its last flush and the next one that did not come.
    seen_ns = int(lease["renewed_ns"]) if lease is not None else 0
    ledger = [entry for entry in read_ledger(run_folder / "ledger") if entry.state != "unknown"]
    seats = [WorkerSeat(**worker) for worker in facts.get("workers", [])]
    tail = []
    for index, seat in enumerate(seats):
        own = [entry for entry in ledger if (entry.node_id, entry.gpu_id) == (seat.node_id, seat.gpu_id)]
        t0_ns = max([seat.acquired_ns, *(entry.t1_ns for entry in own)])
        if seat.released_ns is not None:
            continue
        t1_ns = max(t0_ns, min(max(t0_ns, seen_ns) + round(FLUSH_EVERY_S * NS_PER_S), now_ns))
        seats[index] = replace(seat, released_ns=t1_ns)
        if t1_ns > t0_ns:
            price_id = str(facts["price_id"])
            entry = LedgerEntry(
                run_id=seat.run_id, gpu_id=seat.gpu_id, node_id=seat.node_id, group_id=seat.group_id, rank=seat.rank,
                state="unknown", id=None, attempt=None, chunk=None, t0_ns=t0_ns, t1_ns=t1_ns,
                price_id=price_id, cost_usd=cost_of(price_id, t1_ns - t0_ns),
            )  # fmt: skip
            tail.append(entry)
    if tail:
        write_ledger_file(run_folder / "ledger" / "tail-unknown.parquet", tail)
    facts.update(state="lost", workers=[asdict(seat) for seat in seats], closed_by_run=closed_by)
    write_atomically(run_folder / "run.json", json.dumps(facts, indent=1, default=str).encode())


def _claimed_ns(run_folder: Path, now_ns: int, closed_by: str) -> int:
    """The moment at which the run was first found dead; whoever says so first says it for everybody."""
    claim = run_folder / "closed.json"
    note = json.dumps({"found_dead_ns": now_ns, "by_run": closed_by}).encode()
    create_bytes_if_absent(claim, note, scratch=run_folder / f".closed.{closed_by}")
    return int(json.loads(claim.read_bytes())["found_dead_ns"])


def _read_lease(attempts: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((attempts / "lease.json").read_bytes()))
    except (OSError, ValueError):
        return None


def _identity() -> dict[str, Any]:
    """Which process on which boot of which machine this is, so that its end can be seen at once from beside it."""
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "start": _start_ticks(os.getpid())}


def _is_alive(lease: Mapping[str, Any], now_ns: int) -> bool:
    if (lease.get("host"), lease.get("boot")) == (socket.gethostname(), _boot_id()):
        return _start_ticks(int(lease["pid"])) == lease.get("start") is not None
    return now_ns < int(lease.get("expires_ns", 0))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> str | None:
    """When process `pid` started, in clock ticks since boot; None if there is no such process (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *after_name = stat.rpartition(")")[2].split()
    return None if state == "Z" else after_name[18]
