"""Which tensors of the blocks tensor parallelism cuts, along which dimension, and into how many parts it can.

Every attention and feed-forward is a pair of cuts: what makes heads, or the wide side of a feed-forward, is cut by
rows, so each device makes some of them; what takes them back is cut by columns, so each device makes a part of a sum.
All else is held whole. Names and numbers only, no torch: planning may ask too. Applied in `tensor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from pipeline.errors import UsageError
from pipeline.model.hparams import DenoiserHparams
from pipeline.model.share import Region, Share


class Split(Enum):
    """COLUMN: by outputs, weights (N, D) and biases (N,) along N. ROW: by inputs, weights along D; biases are whole."""

    COLUMN = auto()
    ROW = auto()


# Last name of a module in the blocks -> its cut. The same for self-, text and exchange attention of both streams.
SPLITS = {
    "to_q": Split.COLUMN,
    "to_k": Split.COLUMN,
    "to_v": Split.COLUMN,
    "q_norm": Split.COLUMN,
    "k_norm": Split.COLUMN,
    "to_gate_logits": Split.COLUMN,
    "to_out": Split.ROW,
    "widen": Split.COLUMN,
    "narrow": Split.ROW,
}


def split_of(module: str) -> Split | None:
    """The cut of the denoiser's module of this name in code; None if it is held whole."""
    return SPLITS.get(module.rpartition(".")[2]) if module.startswith("blocks.") else None


def is_audio_work(module: str) -> bool:
    """If the denoiser computes this module, by its name in code, in the audio stream's lane (`AudioVideoBlock`)."""
    return ".audio." in module or ".audio_from_video" in module


def region(place: str, shape: Sequence[int], share: Share) -> Region:
    """What of the tensor of this name in code, `shape` as a whole, a share holds."""
    module, _, _ = place.rpartition(".")
    split = split_of(module)
    if split is Split.COLUMN:
        return (share.of(shape[0]),)
    if split is Split.ROW and len(shape) > 1:
        return (slice(None), share.of(shape[1]))
    return ()


def degrees(hparams: DenoiserHparams) -> list[int]:
    """Into how many parts the heads of every stream can be cut, rising from 1."""
    heads = [stream.num_heads for stream in (hparams.video, hparams.audio) if stream is not None]
    return [degree for degree in range(1, min(heads) + 1) if not any(number % degree for number in heads)]


def require_degree(hparams: DenoiserHparams, degree: int) -> None:
    """UsageError, naming the degrees that are possible, unless the heads can be cut into `degree` parts."""
    if degree not in degrees(hparams):
        heads = f"{hparams.video.num_heads} video heads"
        if hparams.audio is not None:
            heads += f" and {hparams.audio.num_heads} audio heads"
        raise UsageError(
            f"the degree of tensor parallelism must divide the model's {heads}, got {degree}; "
            f"use one of {degrees(hparams)}"
        )
