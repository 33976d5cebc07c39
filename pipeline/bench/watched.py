"""An engine that is watched while it renders: what its latents were, and other pictures for those it decoded."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from pipeline.engine.engine import Latents, RenderEngine, Streams
from pipeline.records.frames import YuvFrames


@dataclass(frozen=True, kw_only=True)
class WatchedEngine(RenderEngine):
    """An engine that keeps the last clip's latents, and hands on `pictures`, if there are some, for what it decoded."""

    kept: list[Latents]
    # Frames of the clips' size, as many as they have.
    pictures: YuvFrames | None = None

    @classmethod
    def of(cls, engine: RenderEngine, kept: list[Latents]) -> Self:
        """All of `engine`, whose latents go to `kept`."""
        return cls(**{each.name: getattr(engine, each.name) for each in fields(engine)}, kept=kept)

    def sample(self, *args: Any, **kwargs: Any) -> Latents:
        latents = super().sample(*args, **kwargs)
        self.kept[:] = [latents]
        return latents

    def render(self, *args: Any, **kwargs: Any) -> Streams:
        streams = super().render(*args, **kwargs)
        if self.pictures is None:
            return streams
        return replace(streams, frames=_shown_instead(streams.frames, self.pictures))


def _shown_instead(decoded: Generator[YuvFrames, None, None], pictures: YuvFrames) -> Generator[YuvFrames, None, None]:
    """Chunks as they are decoded, each with as many of `pictures` in its frames' place."""
    first = 0
    with closing(decoded):
        for chunk in decoded:
            yield YuvFrames(pictures.planes[first : first + chunk.num_frames])
            first += chunk.num_frames
