"""The connection to Ray: to the cluster that RAY_ADDRESS names, or to a Ray of this machine that we start and end.

`ray.init` runs on a thread of its own. On the main thread it would replace the handler of SIGTERM and keep signals
waiting for its seconds; and Linux ends Ray's processes with the *thread* that started them, so that thread stays.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import ray
from ray._private import worker as ray_worker

from pipeline.cluster.ray_folder import new_folder, start_reaper
from pipeline.errors import PipelineError, UsageError

ADDRESS = "RAY_ADDRESS"
CONNECT_S = 5.0
# Ray does not say why a cluster that listens cannot be joined.
TOKEN_HINT = "if the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it; else "
# Records are small; Ray's own default would take a third of the machine's memory.
OBJECT_STORE_BYTES = 100 * 2**20
# Ray's part of a shutdown in this process takes 0.3 s; its processes get 1 s more, or are killed.
DISCONNECT_S = 0.8


class RaySession:
    """Ray as this process uses it. A Ray that was connected before stays as it is."""

    def __init__(self, start_timeout_s: float) -> None:
        self._address = os.environ.get(ADDRESS) or None
        self._start_timeout_s = start_timeout_s
        self._up = threading.Event()
        self._close = threading.Event()
        self._closed = threading.Event()
        self._error: PipelineError | None = None
        self._ours = False
        self._folder: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._deadline_s = 0.0
        self._children_before: set[int] = set()

    def open(self) -> None:
        """Start connecting; `wait_until_up` says when it is done."""
        if ray.is_initialized():
            self._up.set()
            return
        self._ours = True
        self._deadline_s = time.monotonic() + self._start_timeout_s
        if self._address is None:
            self._folder = new_folder()
            self._reaper = start_reaper(self._folder)
        self._children_before = set(_descendants(os.getpid()))
        threading.Thread(target=self._hold, name="ray", daemon=True).start()

    def wait_until_up(self, timeout_s: float) -> bool:
        """False if it takes longer; raises UsageError for an address that is no Ray, PipelineError if none starts."""
        if not self._up.wait(timeout_s):
            if time.monotonic() > self._deadline_s:
                raise self._refusal(f"no answer within {self._start_timeout_s:g} s")
            return False
        if self._error is not None:
            raise self._error
        if self._ours and threading.current_thread() is threading.main_thread():
            # Ray's C++ handler prints a stack trace at SIGTERM before ours runs; this puts ours first again.
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.getsignal(signum))
        return True

    def close(self, *, abandon: bool) -> None:
        """Disconnect, and end the Ray that we started. With `abandon` nothing is waited for that can be killed."""
        if not self._ours:
            return
        self._close.set()
        if self._up.is_set():
            deadline_s = time.monotonic() + (DISCONNECT_S if abandon else 10.0)
            while time.monotonic() < deadline_s and not self._closed.wait(0.02):
                if abandon and not hasattr(ray_worker.global_worker, "core_worker"):
                    break  # what is left is Ray's patience with its processes
        if self._folder is None or self._reaper is None:
            return
        self._kill_processes()
        if self._closed.is_set():
            self._reaper.kill()
            self._reaper.communicate()
        else:
            threading.Thread(target=self._keep_killing, name="ray-killer", daemon=True).start()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hold(self) -> None:
        try:
            if self._address is None:
                self._start_local()
            else:
                _check_address(self._address)
                ray.init(address=self._address, log_to_driver=True, logging_level=logging.ERROR)
        except PipelineError as error:
            self._error = error
        except (Exception, SystemExit) as error:  # noqa: BLE001 - Ray raises all kinds, and a thread has no one above it
            self._error = self._refusal(str(error).strip().partition("\n")[0] or type(error).__name__)
        self._up.set()
        self._close.wait()
        with suppress(Exception):
            ray.shutdown()
        self._closed.set()
        threading.Event().wait()  # to the end of the process: see the module's docstring

    def _start_local(self) -> None:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=True,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self._folder),
        )

    def _refusal(self, reason: str) -> PipelineError:
        if self._address is None:
            return PipelineError(f"Ray could not be started on this machine: {reason}; use cluster=in_process")
        hint = TOKEN_HINT if reason.startswith("Failed to connect") else ""
        return UsageError(
            f"{ADDRESS} must be the host:port of a running Ray cluster, got {self._address!r}: {reason}; "
            f"{hint}correct it, or unset it to use this machine"
        )

    def _kill_processes(self) -> None:
        """End every process that came to be under this one since `open`. Stopped first, none can start another."""
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for pid in _descendants(os.getpid()):
                if pid not in self._children_before:
                    with suppress(OSError):
                        os.kill(pid, signum)

    def _keep_killing(self) -> None:
        """For a Ray that was given up while it started: its thread goes on and starts what comes next.

        What it starts in the last moment of this process is the reaper's.
        """
        while True:
            self._kill_processes()
            time.sleep(0.02)


def _check_address(address: str) -> None:
    """UsageError for an address that Ray would only give up on after half a minute."""

    def refused(reason: str) -> UsageError:
        return UsageError(
            f"{ADDRESS} must be the host:port of a running Ray cluster, got {address!r}: {reason}; correct it, or "
            "unset it to use this machine"
        )

    if address in ("auto", "local"):
        return
    if "://" in address:
        raise refused("workers need a driver inside the cluster; submit the job there (`ray job submit`)")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise refused("that is not host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise refused(str(error)) from None  # not a bug: no traceback


def _descendants(root: int) -> list[int]:
    """The processes under `root`, nearest first; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(0), [])
        found += below
        todo += below
    return found
