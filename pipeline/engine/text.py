"""Prompts to what the denoiser attends to, with a small cache: a batch often asks for the same words again.

The networks are in `components/`; when text is encoded is the engine's matter.
"""

from __future__ import annotations

from collections import OrderedDict

from pipeline.engine.components.connectors import TextConnectors
from pipeline.engine.components.text import TextContext
from pipeline.engine.components.text_encoder import REWRITE_INSTRUCTIONS, TextEncoder
from pipeline.engine.residency import ALL_RESIDENT, Residency

# A published context pair is 15 MB in bfloat16, so eight prompts cost a tenth of a gigabyte.
NUM_CACHED_PROMPTS = 8
TEXT_ENCODER = "text_encoder"


class TextConditioner:
    """Text encoder and connectors as one function of a prompt. Not thread-safe."""

    def __init__(self, encoder: TextEncoder, connectors: TextConnectors, residency: Residency = ALL_RESIDENT) -> None:
        self._encoder = encoder
        self._connectors = connectors
        self._residency = residency
        self._cache: OrderedDict[str, TextContext] = OrderedDict()

    def encode(self, prompt: str) -> TextContext:
        """Contexts of both streams, batch of one."""
        return self.encode_all(prompt)[0]

    def encode_all(self, *prompts: str) -> list[TextContext]:
        """The contexts of each prompt. The least recently used prompts leave a full cache.

        A negative prompt that all rows share is encoded once and then found.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if missing:
            with self._residency.using(TEXT_ENCODER):
                for prompt in missing:
                    self._cache[prompt] = self._connectors.connect(self._encoder.encode([prompt]))
        contexts = [self._cache[prompt] for prompt in prompts]
        for prompt in prompts:
            self._cache.move_to_end(prompt)
        while len(self._cache) > NUM_CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return contexts

    def enhance(self, prompt: str, seed: int) -> str:
        """The prompt as the text encoder itself would put it to the model; the same seed gives the same words."""
        with self._residency.using(TEXT_ENCODER):
            return self._encoder.rewrite(REWRITE_INSTRUCTIONS, prompt, seed=seed)
