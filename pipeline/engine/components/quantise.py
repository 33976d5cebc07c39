"""Weights of a text encoder in 8 or 4 bits, where memory is short. The library is optional: only asked for, if used."""

from __future__ import annotations

import importlib

from torch import nn

from pipeline.errors import UsageError

_TYPES = {8: "qint8", 4: "qint4"}


def quantise_weights(model: nn.Module, *, bits: int) -> None:
    """Put the weights of all linear layers into `bits` (16: leave them), with one scale a row or group; in place.

    Embeddings and norms stay as they are. UsageError for another number of bits, or if optimum-quanto is not installed.
    """
    if bits == 16:
        return
    if bits not in _TYPES:
        raise UsageError(f"the text encoder's weights must have 16, 8 or 4 bits, got {bits}")
    try:
        library = importlib.import_module("optimum.quanto")
    except ImportError as error:
        raise UsageError(
            f"text encoder weights in {bits} bits need the package optimum-quanto, which cannot be imported ({error}); "
            "install it (pip install optimum-quanto) or use 16 bits"
        ) from error
    library.quantize(model, weights=getattr(library, _TYPES[bits]))
    library.freeze(model)
