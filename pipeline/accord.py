"""One item in the hands of all ranks of a gang: they start it together or not at all, and give it up together.

Before each step every rank says if it goes on, and the lowest vote is what all of them do. What goes wrong on one rank
within a step is the cluster's business (`cluster/agreement.py`): ranks that wait in a collective cannot be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import Cancelled, EngineFault

FAILED, CANCELLED, GO_ON = range(3)

Consent = Callable[[int], int]
"""A rank's vote -> the lowest vote of all ranks. Every rank must vote as often."""


def alone(vote: int) -> int:
    """The consent of a worker of one rank."""
    return vote


class Accord:
    """The votes of one rank about one item. `enter` begins a stage, `beat` ends a step; both raise to give up.

    What the engine tells of stages and steps, it tells on every rank alike; so every rank votes as often.
    """

    def __init__(self, consent: Consent, enter: Callable[[str], None], beat: Callable[[str, int, int], None]) -> None:
        self._consent = consent
        self._enter = enter
        self._beat = beat
        self._is_started = False

    def start(self) -> None:
        """Wait for the others. Raises Cancelled or EngineFault if one of them will not start."""
        self._is_started = True
        self._meet()

    def stage(self, stage: str) -> None:
        """What every rank does between two stages."""
        self._vote(lambda: self._enter(stage))

    def step(self, stage: str, step: int, num_steps: int) -> None:
        """What every rank does after a step, and before each chunk of frames."""
        self._vote(lambda: self._beat(stage, step, num_steps))

    def leave(self) -> None:
        """Give a started item up where the others vote next: not within a step."""
        self._consent(CANCELLED)

    @contextmanager
    def leaving_if_raised(self) -> Iterator[None]:
        """Within is what this rank alone does between the others' votes: it leaves for whatever is raised there."""
        try:
            yield
        except Exception:
            self.leave()
            raise

    def refuse(self, vote: int) -> None:
        """Let the others not wait for an item that this rank will not start. No effect once it has."""
        if not self._is_started:
            self._is_started = True
            self._consent(vote)

    def _vote(self, go_on: Callable[[], None]) -> None:
        try:
            go_on()
        except Cancelled:
            self._consent(CANCELLED)
            raise
        self._meet()

    def _meet(self) -> None:
        verdict = self._consent(GO_ON)
        if verdict == CANCELLED:
            raise Cancelled("given up by another rank of the gang")
        if verdict == FAILED:
            raise EngineFault("another rank of the gang could not start the clip")
