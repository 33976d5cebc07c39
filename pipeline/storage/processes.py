"""Which process on which machine: what a file can say of its writer, so that its end is seen from beside it."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path


@cache
def place() -> str:
    """Where process ids mean the same processes: machine, boot, and PID namespace (containers share the first two)."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the target is a name, not a path
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {boot_id()} {namespace}"


def boot_id() -> str:
    """Changes with every start of the machine; empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def writer() -> str:
    """This process, as the beginning of a file's name: place (hashed), process id, and when it started."""
    return f"{hashlib.sha256(place().encode()).hexdigest()[:12]}-{os.getpid()}-{start_ticks(os.getpid())}"


def writer_is_gone(name: str) -> bool:
    """True only of a name that begins with a process of this place which has ended; the hash may be cut short."""
    where, pid, start, *_ = (*name.split("-", 3), "", "")
    if not pid.isdigit() or not where or not writer().partition("-")[0].startswith(where):
        return False
    return str(start_ticks(int(pid))) != start


def start_ticks(pid: int) -> str | None:
    """When process `pid` started, in clock ticks since boot; None if there is no such process (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *after_name = stat.rpartition(")")[2].split()
    return None if state == "Z" else after_name[18]
