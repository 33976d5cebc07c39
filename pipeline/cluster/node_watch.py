"""Which nodes are about to go: asked of Ray every second, on a thread, for Ray may take its time to answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ray._private.state import state as ray_state
from ray.exceptions import RayError

LOOK_EVERY_S = 1.0
LAST_ANSWER_S = 0.2


class NodeWatch:
    """Calls `on_change` with the nodes that drain and the UTC milliseconds of their end (0: not known), when that
    changes; on its own thread."""

    def __init__(self, on_change: Callable[[Mapping[str, int]], None]) -> None:
        self._on_change = on_change
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. A question that is under way gets a moment: Ray must not be left while it is answered."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(LAST_ANSWER_S)

    def _watch(self) -> None:
        known: Mapping[str, int] = {}
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                draining = ray_state.get_draining_nodes()
            except (RayError, RuntimeError, ValueError):
                continue  # Ray is being left, or its head is away for a moment
            if draining != known and not self._stop.is_set():
                known = draining
                self._on_change(draining)
