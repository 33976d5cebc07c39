"""One item, start to finish: engine, file, check, commit. The only place where frames meet storage.

An item has two halves. The device's ends with the last decoded frame, and the next item can begin; the host's encodes,
checks, uploads and commits on a thread of its own meanwhile. One clip is finished at a time: a device that is two clips
ahead of a slow store waits. Whatever goes wrong with an item comes back as a `Failed` outcome; what goes wrong with the
worker itself raises. Does not choose items, retry, or write tables.
"""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.accord import CANCELLED, Accord
from pipeline.attempt import Attempt
from pipeline.cluster.assignment import Assignment, signs_of_life
from pipeline.cost.meter import Meter
from pipeline.errors import Cancelled, DeviceBroken, EngineFault
from pipeline.media.frame_buffer import FrameBuffer
from pipeline.media.mux import EncodeReport, EncodeSettings, write_clip
from pipeline.media.probe import ClipFacts, check_clip, probe_clip
from pipeline.media.thumbnail import write_thumbnail
from pipeline.records.frames import YuvFrames
from pipeline.records.outcome import (
    NS_PER_S,
    ClipAsset,
    Failed,
    Rendered,
    RunFacts,
    Timings,
    adopting,
    asset_of,
    commit_record,
)
from pipeline.records.work import WorkItem
from pipeline.rendering import BEAT_EVERY_S, Renderer, failure, vote_of
from pipeline.storage.assets import AssetStore, Published
from pipeline.storage.patience import Patience
from pipeline.storage.store import Store

if TYPE_CHECKING:
    # The engine is handed in: whoever hands in another one (tests/chaos) need not load torch.
    from pipeline.engine.engine import Streams

log = logging.getLogger(__name__)

# Decoded frames that wait for the encoder: a clip of 1920x1088 and 121 frames has 0.38 GB.
MAX_BUFFERED_BYTES = 2 << 30


@dataclass(frozen=True)
class ClipFiles:
    """What a clip's files are written with."""

    encode: EncodeSettings
    thumbnail_quality: int


@dataclass(frozen=True)
class ClipWorker:
    """A ready worker, or the rank that leads one: an engine that holds its model, a store, a meter.

    Executes one item at a time.
    """

    renderer: Renderer
    store: Store
    # How long the store may be away before an attempt is given up for it.
    patience_s: float
    # A local folder for files that are not finished.
    scratch: Path
    meter: Meter
    # By the name of the recipe.
    files: Mapping[str, ClipFiles]
    facts: RunFacts
    now_ns: Callable[[], int]
    # The most device memory in use since the last call, in bytes; None where there is no device.
    take_peak_gpu_bytes: Callable[[], int | None]
    # If a clip that somebody committed since the run was planned is taken as it is.
    resume: bool = True
    # False where the driver alone may commit, because the store's `create` is not exclusive.
    commits: bool = True
    # Held by the clip that is being finished.
    _finishing: threading.Lock = field(default_factory=threading.Lock)

    def execute(self, assignment: Assignment) -> None:
        """Render one item, and commit it when its file is finished. Never raises for what the item, its files or the
        store did."""
        item = assignment.item
        stem = self.scratch / f"{item.key[:12]}.{item.attempt}"
        attempt = Attempt(assignment, self.meter, self.now_ns, stem, self.now_ns(), self._patient_store(assignment))
        accord = self.renderer.accord_on(assignment, attempt.enter)
        buffer = FrameBuffer(MAX_BUFFERED_BYTES)
        has_finisher = False
        try:
            attempt.enter("text_encode")
            # Another driver, or a worker of one that died, may have committed it since the plan.
            if self.resume and (standing := attempt.store.standing(item.key)) is not None:
                self.renderer.refuse(assignment, accord, CANCELLED)
                assignment.end(self._adopted(attempt, standing))
                return
            self.take_peak_gpu_bytes()
            streams = self.renderer.start(assignment, accord)
            with accord.leaving_if_raised():
                self._await_turn(attempt)
                self._start_finishing(attempt, streams, buffer)
            has_finisher = True
            self._decode(attempt, streams, buffer, accord)
        except DeviceBroken:
            raise  # the worker's own end: whatever it tried next would fail too
        except Exception as error:  # noqa: BLE001 - one row's bug must not end the night for the others
            if has_finisher:
                buffer.complete(error)
            else:
                self.renderer.refuse(assignment, accord, vote_of(error))
                self.meter.forget(item.request.id, item.attempt)
                assignment.end(failure(item, error, attempt.started_ns, self.now_ns()))
        finally:
            attempt.leave_device()
            attempt.peak_gpu_bytes = self.take_peak_gpu_bytes()
            buffer.complete()

    def _patient_store(self, assignment: Assignment) -> AssetStore:
        def pause(wait_s: float) -> bool:
            end_s = time.monotonic() + wait_s
            while (left_s := end_s - time.monotonic()) > 0:
                assignment.beat("wait")
                time.sleep(min(left_s, BEAT_EVERY_S))
            return True

        return AssetStore(self.store.with_patience(Patience(self.patience_s, pause)))

    def _adopted(self, attempt: Attempt, standing: Mapping[str, Any]) -> Rendered:
        return Rendered(
            item=attempt.item,
            asset=asset_of(standing),
            timings=Timings(queued_s=(attempt.started_ns - attempt.item.queued_ns) / NS_PER_S),
            started_ns=attempt.started_ns,
            finished_ns=self.now_ns(),
            prompt=standing["prompt"],
            adopted_from=standing["run_id"],
            adopted_attempt=standing["attempt"],
        )

    def _await_turn(self, attempt: Attempt) -> None:
        """Wait until the clip before is finished."""
        if not self._finishing.acquire(blocking=False):
            attempt.enter("wait")
            while not self._finishing.acquire(timeout=BEAT_EVERY_S):
                attempt.assignment.beat("wait")
            try:
                attempt.enter("decode")
            except Cancelled:
                self._finishing.release()
                raise

    def _start_finishing(self, attempt: Attempt, streams: Streams, buffer: FrameBuffer) -> None:
        # With what this thread's log lines are about.
        finish = partial(copy_context().run, self._finish, attempt, streams, buffer)
        try:
            threading.Thread(target=finish, name="finish", daemon=True).start()
        except RuntimeError:  # the machine has no thread left
            self._finishing.release()
            raise

    def _decode(self, attempt: Attempt, streams: Streams, buffer: FrameBuffer, accord: Accord) -> None:
        with closing(streams.frames):
            for chunk in streams.frames:
                with accord.leaving_if_raised():
                    while not buffer.put(chunk, BEAT_EVERY_S):
                        # The encoder shows signs of life, if it lives.
                        attempt.book("wait")
                    if buffer.has_reader:
                        attempt.enter("decode")
                        continue
                accord.leave()
                return

    def _finish(self, attempt: Attempt, streams: Streams, buffer: FrameBuffer) -> None:
        """The host's half, on its own thread: the file, its check, the commit, the answer."""
        item = attempt.item
        try:
            outcome: Rendered | Failed = self._finished(attempt, streams, buffer)
        except Exception as error:  # noqa: BLE001 - as in `execute`
            outcome = failure(item, error, attempt.started_ns, self.now_ns())
        finally:
            buffer.abandon()
            for suffix in (".mp4", ".jpg", ".theirs.mp4"):
                with suppress(OSError):  # what cannot be removed now is swept with the run's attempts
                    _with_suffix(attempt.stem, suffix).unlink(missing_ok=True)
            self.meter.leave_host()
            self.meter.forget(item.request.id, item.attempt)
            self._finishing.release()
        attempt.assignment.end(outcome)

    def _finished(self, attempt: Attempt, streams: Streams, buffer: FrameBuffer) -> Rendered:
        item, files = attempt.item, self.files[attempt.item.request.recipe]
        video, thumbnail = (_with_suffix(attempt.stem, suffix) for suffix in (".mp4", ".jpg"))
        sample_rate_hz = streams.sample_rate_hz or 0
        attempt.enter_host("encode")
        written = write_clip(
            video,
            _beating(buffer.chunks(), attempt.assignment),
            streams.waveform,
            fps=item.request.fps,
            num_frames=item.request.num_frames,
            sample_rate_hz=sample_rate_hz,
            settings=files.encode,
        )
        # The store's client ends what stands still; what moves may take its time.
        with signs_of_life(attempt.assignment, "upload", BEAT_EVERY_S):
            write_thumbnail(thumbnail, written.first_frame, quality=files.thumbnail_quality)
            facts = self._checked(video, item, sample_rate_hz)
            attempt.enter_host("upload")
            return self._committed(attempt, streams, written, facts)

    def _committed(self, attempt: Attempt, streams: Streams, written: EncodeReport, facts: ClipFacts) -> Rendered:
        item, since_s = attempt.item, time.monotonic()
        video, thumbnail = (_with_suffix(attempt.stem, suffix) for suffix in (".mp4", ".jpg"))
        published = attempt.store.publish_video(video, item.file_stem)
        published, facts = self._adopt_if_taken(attempt, published, facts, video, streams.sample_rate_hz or 0)
        poster = attempt.store.publish_thumbnail(thumbnail, item.file_stem)
        rendered = Rendered(
            item=item,
            asset=_asset(published.uri, poster.uri, facts),
            timings=attempt.timings(written.encode_busy_s, time.monotonic() - since_s),
            started_ns=attempt.started_ns,
            finished_ns=self.now_ns(),
            prompt=streams.prompt,
            peak_gpu_memory_bytes=attempt.peak_gpu_bytes,
            peak_host_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        record = commit_record(rendered, self.meter.entries_of(item.request.id, item.attempt), self.facts)
        if not self.commits:
            return replace(rendered, record=record)
        standing = attempt.store.commit(item.key, record)
        settled = adopting(rendered, standing, self.facts.run_id)
        if settled is not rendered and standing["uri"] != published.uri:
            attempt.store.discard(published)
            attempt.store.discard(poster)
        timings = attempt.timings(written.encode_busy_s, time.monotonic() - since_s)
        return replace(settled, timings=timings, finished_ns=self.now_ns())

    def _checked(self, video: Path, item: WorkItem, sample_rate_hz: int) -> ClipFacts:
        """The facts read back from a file that is exactly what was asked for; EngineFault if it is not."""
        request = item.request
        facts = probe_clip(video)
        check_clip(
            facts,
            width=request.width,
            height=request.height,
            num_frames=request.num_frames,
            fps=request.fps,
            sample_rate_hz=sample_rate_hz,
        )
        return facts

    def _adopt_if_taken(
        self, attempt: Attempt, published: Published, facts: ClipFacts, video: Path, sample_rate_hz: int
    ) -> tuple[Published, ClipFacts]:
        """If another writer's file has the name already: adopt it if it is a whole clip, else put ours there."""
        if published.created or published.sha256 == facts.sha256:
            return published, facts
        theirs = video.with_suffix(".theirs.mp4")
        try:
            attempt.store.fetch(published, theirs)
            return published, self._checked(theirs, attempt.item, sample_rate_hz)
        except EngineFault as fault:
            log.warning("replacing a broken file: %s", fault, extra={"facts": {"uri": published.uri}})
            return attempt.store.replace(published, video), facts


def _asset(uri: str, thumbnail_uri: str, facts: ClipFacts) -> ClipAsset:
    return ClipAsset(
        uri=uri,
        thumbnail_uri=thumbnail_uri,
        sha256=facts.sha256,
        size_bytes=facts.size_bytes,
        width=facts.width,
        height=facts.height,
        num_frames=facts.num_frames,
        fps=facts.fps,
        duration_s=facts.duration_s,
        has_audio=facts.has_audio,
        sample_rate_hz=facts.sample_rate_hz or None,
    )


def _beating(chunks: Iterator[YuvFrames], assignment: Assignment) -> Iterator[YuvFrames]:
    """The chunks; the encoder lives as long as it takes them."""
    for chunk in chunks:
        assignment.beat("encode")
        yield chunk
        del chunk


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
