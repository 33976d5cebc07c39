"""Prompts to what the denoiser attends to, with a small cache: a batch often asks for the same words again.

The networks are in `components/`; when text is encoded is the engine's matter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pipeline.engine.components.connectors import TextConnectors
from pipeline.engine.components.text import TextContext
from pipeline.engine.components.text_encoder import REWRITE_INSTRUCTIONS, TextEncoder
from pipeline.engine.residency import ALL_RESIDENT, Residency

# They wait on the host. A published context pair is 15 MB in bfloat16, so these are half a gigabyte.
NUM_CACHED_PROMPTS = 32
TEXT_ENCODER = "text_encoder"


class TextConditioner:
    """Text encoder and connectors as one function of a prompt. Not thread-safe."""

    def __init__(
        self,
        encoder: TextEncoder,
        connectors: TextConnectors,
        *,
        device: str,
        residency: Residency = ALL_RESIDENT,
    ) -> None:
        self._encoder = encoder
        self._connectors = connectors
        self._device = device
        self._residency = residency
        self._cache: OrderedDict[str, TextContext] = OrderedDict()

    def encode(self, prompt: str) -> TextContext:
        """Contexts of both streams, batch of one."""
        return self.encode_all(prompt)[0]

    def encode_all(self, *prompts: str) -> list[TextContext]:
        """The contexts of each prompt. The least recently used prompts leave a full cache.

        A negative prompt that all rows share is encoded once and then found.
        """
        self._encode_missing(prompts)
        contexts = [self._cache[prompt].to(self._device) for prompt in prompts]
        self._forget_oldest(prompts)
        return contexts

    def prefetch(self, prompts: Sequence[str]) -> None:
        """Encode prompts to come in one use of the text encoder, at most as many as the cache holds."""
        nearest = prompts[:NUM_CACHED_PROMPTS]
        self._encode_missing(nearest)
        self._forget_oldest(nearest)

    def _encode_missing(self, prompts: Sequence[str]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if missing:
            with self._residency.using(TEXT_ENCODER):
                # One at a time: in a batch other shapes would round otherwise.
                for prompt in missing:
                    self._cache[prompt] = self._connectors.connect(self._encoder.encode([prompt])).to("cpu")

    def _forget_oldest(self, used: Sequence[str]) -> None:
        for prompt in used:
            self._cache.move_to_end(prompt)
        while len(self._cache) > NUM_CACHED_PROMPTS:
            self._cache.popitem(last=False)

    def enhance(self, prompt: str, seed: int) -> str:
        """The prompt as the text encoder itself would put it to the model; the same seed gives the same words."""
        with self._residency.using(TEXT_ENCODER):
            return self._encoder.rewrite(REWRITE_INSTRUCTIONS, prompt, seed=seed)
