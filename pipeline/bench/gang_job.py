"""What the ranks of a gang are told to measure, and what they tell while they do. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.model import ModelConfig
from pipeline.geometry import LatentShape
from pipeline.records.parallel import ParallelLayout


@dataclass(frozen=True)
class GangJob:
    """One layout's measurement, the same for every rank. `config` is a file's metadata, `shapes` are clips by name.

    `entrants` gives, on a rank that has joined, who may take part (`gang_entrants.entrants`). A collective that not all
    ranks have come to after `collective_s` ends the gang, as do `silence_s` in which no rank says what it does, and
    `grace_s` after a rank has failed at something that the others are still doing: they may be waiting for it.
    """

    config: Mapping[str, Any]
    model: ModelConfig
    shapes: Mapping[str, LatentShape]
    contestants: tuple[str, ...]
    layout: ParallelLayout
    device: str
    entrants: Callable[..., Any]
    # Compiling a peer takes a minute, and longer on one rank than on another.
    collective_s: float = 300.0
    silence_s: float = 300.0
    grace_s: float = 45.0


@dataclass(frozen=True)
class Listening:
    """The leader waits for the others at this port."""

    port: int


@dataclass(frozen=True)
class Working:
    """What a rank does from now on, as in "while exact was compared"; and for whom, if for one contestant."""

    doing: str
    contestant: str | None = None

    def __str__(self) -> str:
        return self.doing if self.contestant is None else f"{self.contestant} was {self.doing}"


@dataclass(frozen=True)
class Raised:
    """A contestant failed on this rank, which goes on as soon as the others say how they fared."""

    contestant: str
    why: str


@dataclass(frozen=True)
class Broken:
    """This rank ends for what it raised: it may be out of step with the others."""

    why: str


@dataclass(frozen=True)
class Measured:
    """All of one shape: facts of each contestant that did not fail, and the seconds of exchanges by axis."""

    shape: str
    contestants: dict[str, dict[str, Any]]
    exchanges: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """This rank has nothing more to do."""
