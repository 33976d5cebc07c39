"""A run's folder: `run.json`, the event log, the lease that says its driver lives, and tidying up after dead ones.

The lease lies in `_attempts/<run_id>/`. Whoever finds it expired may sweep the attempts and close the dead run's
ledger; on the same machine a driver that is gone is recognised at once, elsewhere when the lease runs out.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UsageError, WorkerLost
from pipeline.records.outcome import NS_PER_S, LedgerEntry, WorkerSeat
from pipeline.storage.filesystem import create_bytes_if_absent, create_folder, storage_error, write_atomically
from pipeline.storage.tables import LedgerTable, read_ledger, write_ledger_file

LEASE_S = 30
# In a run's folder once another driver has closed it.
CLOSED = "closed.json"
# How often a driver writes its ledger and renews its lease. A kill loses at most this much of the ledger.
FLUSH_EVERY_S = 2.0


class RunFolder:
    """The files of one run, written by the one driver that holds its lease.

    A driver that was found dead (suspended for longer than its lease, say) is fenced: its run was closed by another,
    so it writes nothing more and `write_ledger` raises.
    """

    def __init__(self, output: Path, run_id: str) -> None:
        self.run_id = run_id
        self.path = output / "runs" / run_id
        self.attempts = output / "_attempts" / run_id
        self.fenced = False
        self._facts: dict[str, Any] = {}
        self._events: IO[str] | None = None
        self._ledger: LedgerTable | None = None

    def open(self, facts: Mapping[str, Any], now_ns: int) -> None:
        """Claim the run id and write `run.json`; UsageError if the id is taken or the output cannot be written.

        Lease and run folder each appear whole, the lease first: whatever is killed in between can be swept.
        """
        create_folder(self.path.parent)
        taken = UsageError(f"run_id must be new, got {self.run_id!r}, which exists; leave run_id= out")
        if self.path.exists():
            raise taken
        try:
            if not _appear(self.attempts, {"lease.json": json.dumps(_lease(now_ns))}):
                raise taken
            self._facts = dict(facts)
            if not _appear(self.path, {"run.json": _as_json(self._facts)}):
                remove_attempts(self.attempts)
                raise taken
            (self.path / "events").mkdir()
            self._events = (self.path / "events" / "driver.jsonl").open("a", encoding="utf-8")
            self._ledger = LedgerTable(self.path / "ledger")
        except OSError as error:
            raise storage_error(error, f"creating {self.path}") from error

    def update(self, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into `run.json`."""
        self._facts.update(facts)
        if not self.fenced:
            write_atomically(self.path / "run.json", _as_json(self._facts).encode())

    def set_workers(self, seats: list[WorkerSeat]) -> None:
        self.update({"workers": [asdict(seat) for seat in seats]})

    def log(self, event: str, now_ns: int, **facts: Any) -> None:
        """Append one line to the event log. Each line is written at once: a kill loses none that was logged."""
        assert self._events is not None
        try:
            self._events.write(_as_json({"at_ns": now_ns, "event": event, **facts}, indent=None) + "\n")
            self._events.flush()
        except OSError as error:
            raise storage_error(error, "writing the event log") from error

    def write_ledger(self, closed: Sequence[LedgerEntry], running: Sequence[LedgerEntry], now_ns: int) -> None:
        """Make all entries so far readable and renew the lease; WorkerLost if another driver has closed this run."""
        assert self._ledger is not None
        if self.fenced:
            return
        if (self.path / CLOSED).exists():
            self.fenced = True
            raise WorkerLost(
                f"run {self.run_id} was found dead and closed by another driver while it stood still; what it "
                "committed stays, the same command goes on"
            )
        self._ledger.add(closed)
        self._ledger.flush(running)
        write_atomically(self.attempts / "lease.json", json.dumps(_lease(now_ns)).encode())

    def close(self) -> None:
        """Give the lease back and remove what is left of this run's attempts."""
        if self._events is not None:
            self._events.close()
        remove_attempts(self.attempts)


def _appear(folder: Path, files: Mapping[str, str]) -> bool:
    """Create `folder` with `files` in it, all at once; False if it exists."""
    for _ in range(100):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            temporary.chmod(0o755)
            for name, text in files.items():
                (temporary / name).write_text(text)
            temporary.rename(folder)
        except FileNotFoundError:
            continue  # another run has just removed the parent, which it found empty
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        return True
    raise OSError(errno.ENOENT, f"{folder.parent} keeps vanishing")


def _as_json(value: Any, indent: int | None = 1) -> str:
    """JSON that any reader takes: a number that is not finite becomes null, what JSON has no form for becomes text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, default=str, ensure_ascii=False, allow_nan=False)


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
    the same time: both write the same files.
    """
    closed = []
    for attempts in sorted((output / "_attempts").glob("*")):
        if attempts.name == closed_by:
            continue
        if attempts.name.startswith("."):
            # A driver was killed while it made its lease; one that is making it now is given its time.
            with suppress(OSError):
                if now_ns - attempts.stat().st_mtime_ns > LEASE_S * NS_PER_S:
                    shutil.rmtree(attempts, ignore_errors=True)
            continue
        lease = _read_lease(attempts)
        if lease is not None and _is_alive(lease, now_ns):
            continue
        run_folder = output / "runs" / attempts.name
        if (run_folder / "run.json").exists():
            _close_run(run_folder, lease, now_ns, cost_of, closed_by)
            closed.append(attempts.name)
        remove_attempts(attempts)
    return closed


def is_running(run_folder: Path, now_ns: int) -> bool:
    """If the driver of this run still lives, by its lease."""
    lease = _read_lease(run_folder.parent.parent / "_attempts" / run_folder.name)
    return lease is not None and _is_alive(lease, now_ns)


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
    try:
        ledger = [entry for entry in read_ledger(run_folder / "ledger") if entry.state != "unknown"]
    except UsageError as error:
        # An unreadable table (a power cut, a hand edit) must not stop every later run; it stays for a person to see.
        facts.update(state="lost", closed_by_run=closed_by, ledger_problem=str(error))
        write_atomically(run_folder / "run.json", _as_json(facts).encode())
        return
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
    write_atomically(run_folder / "run.json", _as_json(facts).encode())


def _claimed_ns(run_folder: Path, now_ns: int, closed_by: str) -> int:
    """The moment at which the run was first found dead; whoever says so first says it for everybody."""
    claim = run_folder / CLOSED
    note = json.dumps({"found_dead_ns": now_ns, "by_run": closed_by}).encode()
    create_bytes_if_absent(claim, note, scratch=run_folder / f".closed.{closed_by}")
    return int(json.loads(claim.read_bytes())["found_dead_ns"])


def _read_lease(attempts: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((attempts / "lease.json").read_bytes()))
    except (OSError, ValueError):
        return None


def _lease(now_ns: int) -> dict[str, Any]:
    """The lease of this process, with which process on which boot of which machine it is: beside it, its end can be
    seen at once."""
    pid = os.getpid()
    return {
        "renewed_ns": now_ns, "expires_ns": now_ns + LEASE_S * NS_PER_S,
        "place": _place(), "pid": pid, "start": _start_ticks(pid),
    }  # fmt: skip


def _is_alive(lease: Mapping[str, Any], now_ns: int) -> bool:
    if lease.get("place") == _place():
        return _start_ticks(int(lease["pid"])) == lease.get("start") is not None
    return now_ns < int(lease.get("expires_ns", 0))


def _place() -> str:
    """Where process ids mean the same processes: machine, boot, and PID namespace (containers share the first two)."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the target is a name, not a path
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {_boot_id()} {namespace}"


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
