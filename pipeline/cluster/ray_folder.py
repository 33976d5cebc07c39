"""The folder of a Ray of ours, and what runs in it: both go when the driver is killed, at once or at the next start.

`kill -9` of a driver ends the processes that Ray started from it; their children, Ray's workers and agents, would go on
for two seconds, and up to a minute. So a process beside the driver, the reaper, waits for its end and clears up. It
loads nothing outside the standard library (`start_reaper` keeps it from doing so): it costs 0.03 s and 10 MB.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pipeline.storage.processes import writer, writer_is_gone

# With its driver's pid and start: the paths of Ray's sockets are bounded, so the name must be short.
SOCKETS_PREFIX = "ltx-ray-"
# A driver killed while Ray starts may leave a process that has yet to open its log.
QUIET_S = 0.4
# What cannot be killed by then (stuck in the kernel) keeps its folder.
GIVE_UP_S = 5.0


def new_folder() -> Path:
    """An empty folder for the Ray of this process; what killed drivers of this machine left is swept before."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SOCKETS_PREFIX}*"):
        if writer_is_gone(folder.name.removeprefix(SOCKETS_PREFIX)):
            _clear(folder, quiet_s=0.0)
    where, pid, start = writer().split("-")
    folder = Path(tempfile.gettempdir()) / f"{SOCKETS_PREFIX}{where[:4]}-{pid}-{start}"
    folder.mkdir(mode=0o700)
    return folder


def start_reaper(folder: Path) -> subprocess.Popen[bytes]:
    """A process that ends what runs in `folder`, and removes it, as soon as this process is gone however it went."""
    return subprocess.Popen(
        [sys.executable, "-E", "-S", "-m", __name__, str(folder)], cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C at the terminal is not for it
    )  # fmt: skip


def processes_in(folder: Path) -> list[int]:
    """Our user's processes that write to files in `folder`; none where there is no /proc.

    Ray's agents and workers change their names, but they keep their logs open. Who only reads a log is left alone.
    """
    inside, found = f"{folder.resolve()}/", []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.geteuid() and any(_writes(file, inside) for file in _open_files(process)):
                found.append(int(process.name))
    return found


def _open_files(process: Path) -> list[Path]:
    return list((process / "fd").iterdir())


def _writes(file: Path, inside: str) -> bool:
    with suppress(OSError):  # closed meanwhile
        if str(file.readlink()).startswith(inside):
            flags = (file.parent.parent / "fdinfo" / file.name).read_text().partition("flags:")[2].split()[0]
            return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _clear(folder: Path, *, quiet_s: float) -> None:
    """Kill what runs in `folder` until nothing has for `quiet_s`, then remove it."""
    quiet_since_s = time.monotonic()
    give_up_s = quiet_since_s + GIVE_UP_S
    while (pids := processes_in(folder)) or time.monotonic() - quiet_since_s < quiet_s:
        if time.monotonic() > give_up_s:
            return
        if pids:
            quiet_since_s = time.monotonic()
        # Stopped first, none starts another.
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, signum)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # ends with the driver, which alone holds the other end
    _clear(Path(sys.argv[1]), quiet_s=QUIET_S)
