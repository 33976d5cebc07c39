"""Prompts to what the denoiser attends to, with a small cache: a batch often asks for the same words again.

The networks are in `components/`; when text is encoded is the engine's matter.
"""

from __future__ import annotations

from collections import OrderedDict

from pipeline.engine.components.connectors import TextConnectors
from pipeline.engine.components.text import TextContext
from pipeline.engine.components.text_encoder import TextEncoder

# A published context pair is 15 MB in bfloat16, so eight prompts cost a tenth of a gigabyte.
NUM_CACHED_PROMPTS = 8


class TextConditioner:
    """Text encoder and connectors as one function of a prompt. Not thread-safe."""

    def __init__(self, encoder: TextEncoder, connectors: TextConnectors) -> None:
        self._encoder = encoder
        self._connectors = connectors
        self._cache: OrderedDict[str, TextContext] = OrderedDict()

    def encode(self, prompt: str) -> TextContext:
        """Contexts of both streams, batch of one. The least recently used prompt leaves a full cache."""
        if prompt not in self._cache:
            self._cache[prompt] = self._connectors.connect(self._encoder.encode([prompt]))
        self._cache.move_to_end(prompt)
        if len(self._cache) > NUM_CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return self._cache[prompt]
