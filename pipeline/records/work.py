"""A piece of work as the queue hands it out: one request, its content key and what it is expected to take."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from pipeline.records.parallel import ONE_GPU, ParallelLayout
from pipeline.records.request import RenderRequest

# Raised by hand whenever the same request would give other pixels or other sound than before.
# 6: on a GPU eight frames go through a convolution together, and its bias is rounded with what comes after it; on
# Hopper another library attends, densely and over blocks.
# 7: on a GPU queries and keys are normed together and the GELU before float8 rows is another formula; x264 looks ahead
# by more threads.
RENDER_REVISION = 7
# How a clip that does not fit its device is tried again, each rung with the ones before it: all give the same pixels.
MORE_GPUS = "more_gpus"
MEMORY_RUNGS = ("planned", "small_decode_chunks", "offload", MORE_GPUS)
# Why a clip has its layout, where all clips of the job have it.
GIVEN = "given"
# Why it has its layout, where each clip gets one of its own when it is handed out, and this one was not.
NOT_HANDED_OUT = "planned; not handed out"
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
# Holds the place of a prompt or seed. Half of a surrogate pair: no text that can be encoded has one.
_BLANK = "\ud800"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a clip is expected to take on a worker of `num_gpus`, and from which kind of knowledge.

    `gpu_seconds` are those of all GPUs together. `longest_step_s` is the longest stretch of its work without a sign of
    life in between.
    """

    flops: float
    gpu_seconds: float
    cost_usd: float
    source: str
    longest_step_s: float = 0.0
    num_gpus: int = 1

    @property
    def clip_s(self) -> float:
        """Seconds from its start to its end."""
        return self.gpu_seconds / self.num_gpus


@dataclass(frozen=True, slots=True)
class Offer:
    """A layout that a clip may get, and what it would take on it; `misfit` says why it does not fit, empty if it does.

    Of all layouts of as many GPUs it is the best one for the clip.
    """

    layout: ParallelLayout
    estimate: Estimate
    misfit: str = ""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One clip to render. `attempt` counts from 1, `queued_ns` is when the item entered the queue (UTC).

    `memory_rung` is one of MEMORY_RUNGS. With `alone` a worker does nothing else beside it: what then happens to the
    worker is this item's doing.

    `estimate` is for `layout`. `offers`, the narrowest first, are what it may be handed out on instead, on
    `min_gpus` or more; with none there is no choice.
    """

    request: RenderRequest
    key: str
    estimate: Estimate
    attempt: int = 1
    queued_ns: int = 0
    memory_rung: str = MEMORY_RUNGS[0]
    alone: bool = False
    layout: ParallelLayout = ONE_GPU
    layout_reason: str = GIVEN
    offers: tuple[Offer, ...] = ()
    min_gpus: int = 1

    def is_attempt(self, key: str, attempt: int) -> bool:
        """If this is that attempt at that key."""
        return (self.key, self.attempt) == (key, attempt)

    @property
    def file_stem(self) -> str:
        return file_stem(self.request.id, self.key)


def file_stem(row_id: str, key: str) -> str:
    """`<id>.<key12>`, the name of a clip's files. What is unsafe in a file name or URL becomes `_`.

    Two ids may map to one stem only when their keys are equal too, and then they share one video anyway.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", row_id).lstrip(".")[:120] or "_"
    return f"{safe}.{key[:12]}"


@dataclass(frozen=True, slots=True)
class KeyStem:
    """The content of all requests of one form, as canonical JSON around the places of prompt and seed.

    What comes before the prompt (recipe, precision, model: thousands of characters) is hashed once.
    """

    before_prompt: hashlib._Hash
    before_seed: str
    after_seed: str

    def key(self, prompt: str, seed: int) -> str:
        digest = self.before_prompt.copy()
        digest.update(f"{_canonical(prompt)}{self.before_seed}{seed}{self.after_seed}".encode())
        return digest.hexdigest()


def key_stem(
    request: RenderRequest, *, recipe: dict[str, Any], precision: dict[str, Any], model: dict[str, Any]
) -> KeyStem:
    """What the content keys of all requests of `request.form` share; parameters as in `content_key`."""
    content = {
        "request": {**request.pixel_content(), "prompt": _BLANK, "seed": _BLANK},
        "recipe": recipe,
        "precision": precision,
        "model": model,
        "render_revision": RENDER_REVISION,
    }
    # Canonical means sorted by name: prompt before seed.
    before_prompt, before_seed, after_seed = _canonical(content).split(_canonical(_BLANK))
    return KeyStem(hashlib.sha256(before_prompt.encode()), before_seed, after_seed)


def content_key(
    request: RenderRequest, *, recipe: dict[str, Any], precision: dict[str, Any], model: dict[str, Any]
) -> str:
    """sha256 (64 hex digits) of everything that changes pixels or sound (README, "The contract").

    `recipe` is resolved: with what the request changes of it. `model` has the fingerprint of its files.
    """
    return key_stem(request, recipe=recipe, precision=precision, model=model).key(request.prompt, request.seed)


def _canonical(value: Any) -> str:
    return _CANONICAL.encode(value)
