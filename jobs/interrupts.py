"""Signals before a run exists: installed first, so that Ctrl-C during slow imports is a clean exit 5 too.

Imported before anything else by every job; the driver takes the signals over once there is something to save.
Standard library only.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 5
# A terminal that closes hangs up; `nohup` and shells that start a job in the background have some ignored.
STOPPING = tuple(
    signum
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(signum) is not signal.SIG_IGN
)


def _nothing_to_save(signum: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(signum).name
    os.write(2, f"interrupted ({name}); this command had started no run\n".encode())
    os._exit(EXIT_INTERRUPTED)


for _signum in STOPPING:
    signal.signal(_signum, _nothing_to_save)
