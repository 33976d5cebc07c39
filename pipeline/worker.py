"""One item, start to finish: engine, file, check, commit. The only place where frames meet storage.

Whatever goes wrong with an item comes back as a `Failed` outcome; what goes wrong with the worker itself raises.
Does not choose items, retry, or write tables.
"""

from __future__ import annotations

import logging
import resource
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.recipe import RecipeConfig, resolve
from pipeline.cost.meter import Meter
from pipeline.engine.engine import RenderEngine
from pipeline.errors import EngineFault, InvalidRequest, PipelineError, UsageError, fault_of
from pipeline.media.mux import EncodeSettings, write_clip
from pipeline.media.probe import ClipFacts, check_clip, probe_clip
from pipeline.media.thumbnail import write_thumbnail
from pipeline.records.outcome import (
    NS_PER_S,
    ClipAsset,
    Failed,
    Outcome,
    Rendered,
    RunFacts,
    Timings,
    commit_record,
)
from pipeline.records.work import WorkItem
from pipeline.storage.adapters import local_adapter
from pipeline.storage.assets import AssetStore, Published
from pipeline.storage.filesystem import storage_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipRecipe:
    """What the engine follows, and what the file is written with."""

    recipe: RecipeConfig
    encode: EncodeSettings
    thumbnail_quality: int


@dataclass
class _Attempt:
    """The clock of one attempt: which state since when, and the nanoseconds of each state so far."""

    item: WorkItem
    meter: Meter
    now_ns: Callable[[], int]
    started_ns: int
    state: str = ""
    since_ns: int = 0
    spent_ns: dict[str, int] = field(default_factory=dict)

    def enter(self, state: str) -> None:
        now_ns = self.now_ns()
        if self.state:
            self.spent_ns[self.state] = self.spent_ns.get(self.state, 0) + now_ns - self.since_ns
        self.state, self.since_ns = state, now_ns
        self.meter.enter(state, id=self.item.request.id, attempt=self.item.attempt)

    def timings(self, encode_busy_s: float) -> Timings:
        """Seconds so far, the running state up to now."""
        self.enter(self.state)
        seconds = {state: spent / NS_PER_S for state, spent in self.spent_ns.items()}
        return Timings(
            queued_s=(self.started_ns - self.item.queued_ns) / NS_PER_S,
            text_encode_s=seconds.get("text_encode", 0.0),
            denoise_s=seconds.get("denoise", 0.0),
            upsample_s=seconds.get("upsample", 0.0),
            decode_s=seconds.get("decode", 0.0),
            encode_s=encode_busy_s,
            upload_s=seconds.get("upload", 0.0),
            wall_s=(self.now_ns() - self.started_ns) / NS_PER_S,
        )


@dataclass(frozen=True)
class ClipWorker:
    """A ready worker: an engine that holds its model, a store, a meter. Executes one item at a time."""

    engine: RenderEngine
    store: AssetStore
    # A local folder for files that are not finished.
    scratch: Path
    # Where copies of adapters from elsewhere are kept.
    cache: Path
    meter: Meter
    recipes: Mapping[str, ClipRecipe]
    facts: RunFacts
    now_ns: Callable[[], int]
    # The most device memory in use since the last call, in bytes; None where there is no device.
    take_peak_gpu_bytes: Callable[[], int | None]

    def execute(self, item: WorkItem) -> Outcome:
        """Render and commit one item. Never raises for what the item, its files or the store did."""
        attempt = _Attempt(item, self.meter, self.now_ns, self.now_ns())
        attempt.enter("text_encode")
        stem = self.scratch / f"{item.key[:12]}.{item.attempt}"
        try:
            return self._render(item, attempt, stem)
        except OSError as error:
            return self._failed(attempt, storage_error(error, f"writing the clip of row {item.request.id}"))
        except Exception as error:  # one row's bug must not end the night for the others
            if not isinstance(error, PipelineError):
                log.error("row failed", exc_info=error, extra={"facts": {"id": item.request.id}})
            return self._failed(attempt, error)
        finally:
            for suffix in (".mp4", ".jpg", ".theirs.mp4"):
                with suppress(OSError):  # what cannot be removed now is swept with the run's attempts
                    stem.with_name(stem.name + suffix).unlink(missing_ok=True)
            self.meter.enter("idle")

    def _failed(self, attempt: _Attempt, error: Exception) -> Failed:
        item = attempt.item
        self.meter.enter("failed", id=item.request.id, attempt=item.attempt)
        return Failed(
            item=item,
            error_class=type(error).__name__,
            error_message=str(error) or traceback.format_exception_only(error)[-1].strip(),
            fault=fault_of(error),
            started_ns=attempt.started_ns,
            finished_ns=self.now_ns(),
        )

    def _render(self, item: WorkItem, attempt: _Attempt, stem: Path) -> Rendered:
        request, clip = item.request, self.recipes[item.request.recipe]
        video, thumbnail = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".jpg"))
        self.take_peak_gpu_bytes()
        adapters = self._own_adapters(item)
        recipe = resolve(clip.recipe, **request.wishes.overrides())
        streams = self.engine.render(request, recipe, attempt.enter, adapters)
        sample_rate_hz = streams.sample_rate_hz or 0
        written = write_clip(
            video,
            _then(streams.frames, lambda: attempt.enter("encode")),
            streams.waveform,
            fps=request.fps,
            num_frames=request.num_frames,
            sample_rate_hz=sample_rate_hz,
            settings=clip.encode,
        )
        write_thumbnail(thumbnail, written.first_frame, quality=clip.thumbnail_quality)
        facts = self._checked(video, item, sample_rate_hz)
        attempt.enter("upload")
        published = self.store.publish_video(video, item.file_stem)
        published, facts = self._adopt_if_taken(published, facts, video, item, sample_rate_hz)
        poster = self.store.publish_thumbnail(thumbnail, item.file_stem)
        rendered = Rendered(
            item=item,
            asset=_asset(published.uri, poster.uri, facts),
            timings=attempt.timings(written.encode_busy_s),
            started_ns=attempt.started_ns,
            finished_ns=self.now_ns(),
            prompt=streams.prompt,
            peak_gpu_memory_bytes=self.take_peak_gpu_bytes(),
            peak_host_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        record = commit_record(rendered, self.meter.attempt_entries(), self.facts)
        standing = self.store.commit(item.key, record)
        if (standing["run_id"], standing["attempt"]) != (self.facts.run_id, item.attempt):
            if standing["uri"] != published.uri:
                self.store.discard(published)
                self.store.discard(poster)
            rendered = _adopting(rendered, standing)
        return replace(rendered, timings=attempt.timings(written.encode_busy_s), finished_ns=self.now_ns())

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
        self, published: Published, facts: ClipFacts, video: Path, item: WorkItem, sample_rate_hz: int
    ) -> tuple[Published, ClipFacts]:
        """If another writer's file has the name already: adopt it if it is a whole clip, else put ours there."""
        if published.created or published.sha256 == facts.sha256:
            return published, facts
        theirs = video.with_suffix(".theirs.mp4")
        try:
            self.store.fetch(published, theirs)
            return published, self._checked(theirs, item, sample_rate_hz)
        except EngineFault as fault:
            log.warning("replacing a broken file: %s", fault, extra={"facts": {"uri": published.uri}})
            return self.store.replace(published, video), facts


def _adopting(rendered: Rendered, standing: Mapping[str, Any]) -> Rendered:
    """The outcome when another record won: its facts, our time."""
    if standing["sha256"] != rendered.asset.sha256:
        log.warning(
            "another run committed other bytes for the same key; its clip stands",
            extra={"facts": {"key": rendered.item.key, "theirs": standing["sha256"], "ours": rendered.asset.sha256}},
        )
    asset = ClipAsset(**{name: standing[name] for name in ClipAsset.__slots__})
    return replace(rendered, asset=asset, adopted_from=standing["run_id"])


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


def _then(frames: Iterator[np.ndarray], when_done: Callable[[], None]) -> Iterator[np.ndarray]:
    yield from frames
    when_done()
