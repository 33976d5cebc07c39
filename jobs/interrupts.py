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


def _nothing_to_save(signum: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(signum).name
    os.write(2, f"interrupted ({name}) before anything was started; the same command starts it\n".encode())
    os._exit(EXIT_INTERRUPTED)


for _signal in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_signal, _nothing_to_save)
