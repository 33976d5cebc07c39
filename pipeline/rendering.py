"""The part of an item that every rank of a gang does alike: adapters, text, denoising, decoding.

What becomes of the frames is `worker.py`'s, on the rank that leads; the ranks that follow are here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.accord import CANCELLED, FAILED, Accord, Consent, alone
from pipeline.cluster.assignment import Assignment, signs_of_life
from pipeline.config.recipe import RecipeConfig, resolve
from pipeline.cost.meter import Meter
from pipeline.errors import Cancelled, DeviceBroken, InvalidRequest, PipelineError, UsageError, fault_of
from pipeline.records.outcome import Failed
from pipeline.records.work import WorkItem
from pipeline.storage.adapters import local_adapter
from pipeline.storage.filesystem import storage_error

if TYPE_CHECKING:
    # The engine is handed in: whoever hands in another one (tests/chaos) need not load torch.
    from pipeline.engine.engine import RenderEngine, Streams

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0


@dataclass(frozen=True)
class Renderer:
    """An engine and what it needs for an item. `consent` is how the ranks of a gang agree on each step."""

    engine: RenderEngine
    recipes: Mapping[str, RecipeConfig]
    # Where copies of adapters from elsewhere are kept.
    cache: Path
    consent: Consent = alone

    def accord_on(self, assignment: Assignment, enter: Callable[[str], None]) -> Accord:
        """How this rank goes through an item with the others; `enter` begins a stage."""
        return Accord(self.consent, enter, assignment.beat)

    def start(self, assignment: Assignment, accord: Accord) -> Streams:
        """Everything of the device's part but for the picture, which is decoded while its frames are taken."""
        item, upcoming = assignment.item, assignment.upcoming
        self._fetch_ahead(upcoming)
        with signs_of_life(assignment, "text_encode", BEAT_EVERY_S):
            adapters = self._own_adapters(item)
        recipe = resolve(self.recipes[item.request.recipe], **item.request.wishes.overrides())
        self._encode_ahead(item, upcoming)
        # Another rank may fetch an adapter for minutes.
        with signs_of_life(assignment, "text_encode", BEAT_EVERY_S):
            accord.start()
        return self.engine.render(
            item.request, recipe, accord.stage, adapters, on_step=accord.step, memory_rung=item.memory_rung
        )

    def refuse(self, assignment: Assignment, accord: Accord, vote: int) -> None:
        """Tell the other ranks that this one will not start the item, if it has not. They may be long in coming to it.

        The item is answered afterwards: a rank that still works for one that the leader has ended would be taken for
        lost.
        """
        # A gang that has lost a rank cannot vote, and is ended for it.
        with signs_of_life(assignment, "wait", BEAT_EVERY_S), suppress(RuntimeError):
            accord.refuse(vote)

    def _own_adapters(self, item: WorkItem) -> list[tuple[Path, float]]:
        """The row's own adapters (file, strength). What is wrong with them is wrong with the row, not with the job."""
        uses = item.request.wishes.adapters
        try:
            adapters = [(local_adapter(use.uri, use.sha256, self.cache), use.strength) for use in uses]
            if adapters:
                self.engine.fused.check(adapters)
        except UsageError as error:
            raise InvalidRequest((f"loras and camera must be adapters that fit the model: {error}",)) from error
        return adapters

    def _encode_ahead(self, item: WorkItem, upcoming: Sequence[WorkItem]) -> None:
        """Where the text encoder waits on the host, encode the prompts of several items while it is on the device."""
        if self.engine.text_waits:
            clips = [work.request for work in (item, *upcoming)]
            with suppress(Exception):  # said when it is that item's turn, whatever it is
                # One that shall be enhanced is not known yet.
                self.engine.prefetch_texts([clip.prompt for clip in clips if not clip.wishes.enhance_prompt])

    def _fetch_ahead(self, upcoming: Sequence[WorkItem]) -> None:
        """Fetch the adapters of items that may come next, while the device works for this one."""
        uses = [use for item in upcoming for use in item.request.wishes.adapters]

        def fetch() -> None:
            for use in uses:
                with suppress(PipelineError):  # said when it is that item's turn
                    local_adapter(use.uri, use.sha256, self.cache)

        if uses:
            threading.Thread(target=fetch, name="fetch-ahead", daemon=True).start()


@dataclass(frozen=True)
class FollowingWorker:
    """A rank that does not lead its gang: it takes the same steps, writes nothing, and answers only what went wrong."""

    renderer: Renderer
    meter: Meter
    now_ns: Callable[[], int]

    def execute(self, assignment: Assignment) -> None:
        """This rank's part of an item. Never raises for what the item or its files did."""
        item, started_ns = assignment.item, self.now_ns()

        def enter(stage: str) -> None:
            assignment.beat(stage)
            self.meter.enter(stage, id=item.request.id, attempt=item.attempt)

        accord = self.renderer.accord_on(assignment, enter)
        try:
            enter("text_encode")
            frames = self.renderer.start(assignment, accord).frames
            # The leader may wait for its encoder, and only it knows how long that may be.
            with closing(frames), signs_of_life(assignment, "decode", BEAT_EVERY_S):
                for _ in frames:
                    pass
        except DeviceBroken:
            raise  # the worker's own end: whatever it tried next would fail too
        except Exception as error:  # noqa: BLE001 - the leader says what becomes of the item
            self.renderer.refuse(assignment, accord, vote_of(error))
            assignment.end(failure(item, error, started_ns, self.now_ns()))
        else:
            assignment.end(None)
        finally:
            self.meter.enter("idle")
            self.meter.forget(item.request.id, item.attempt)


def vote_of(error: Exception) -> int:
    """What an error before the first step means for the other ranks."""
    return CANCELLED if isinstance(error, Cancelled) else FAILED


def failure(item: WorkItem, error: Exception, started_ns: int, finished_ns: int) -> Failed:
    """The answer to an item that raised `error`; what is nobody's known failure is logged with its traceback."""
    if isinstance(error, OSError):
        error = storage_error(error, f"writing the clip of row {item.request.id}")
    elif not isinstance(error, PipelineError):
        log.error("row failed", exc_info=error, extra={"facts": {"id": item.request.id}})
    return Failed(
        item=item,
        error_class=type(error).__name__,
        error_message=str(error) or type(error).__name__,
        fault=fault_of(error),
        started_ns=started_ns,
        finished_ns=finished_ns,
    )
