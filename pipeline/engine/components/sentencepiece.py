"""T5's published tokenizer is a `spiece.model`: a vocabulary in protocol buffers, read here without a library for it.

The format is sentencepiece's `sentencepiece_model.proto`: of the model, pieces (field 1: text 1, score 2) and the
normaliser (field 3: character map 2). How text is cut into pieces is the library's work.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import T5Tokenizer

from pipeline.errors import UsageError

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def t5_tokenizer(folder: Path) -> Any:
    """The tokenizer of `folder`/spiece.model; UsageError if there is no such file or it is not of this format."""
    path = folder / "spiece.model"
    if not path.is_file():
        raise UsageError(
            f"text encoder folder {folder} lacks tokenizer.json or spiece.model; stage the model's files again"
        )
    try:
        pieces, character_map = _vocabulary(path.read_bytes())
    except (IndexError, struct.error, KeyError, ValueError) as error:
        raise UsageError(f"{path} must be a sentencepiece model, got bytes that are not; stage it again") from error
    return T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=character_map, padding_side="right")


def _vocabulary(data: bytes) -> tuple[list[tuple[str, float]], bytes | None]:
    pieces, character_map = [], None
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0))
        elif number == 3:
            character_map = dict(_fields(value)).get(2)
    if not pieces:
        raise ValueError("no pieces")
    return pieces, character_map


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol-buffers message; fixed values as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        else:
            size = {_FIXED_32: 4, _FIXED_64: 8}[kind]
        if at + size > len(data):
            raise ValueError("a field reaches past the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
