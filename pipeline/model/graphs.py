"""Small denoiser calls as CUDA graphs, one for each shape: their kernels are queued once by Python, then replayed.

Python takes 0.12 to 0.3 s to queue the kernels of a 19B call, however few tokens it has; below some 6,000 video tokens
an H200 waits for it, and below some 10,000 in the fast tier. A graph computes what the call computes, to the bit. It
reads and writes tensors of its own, and weights at the addresses at which they lay when it was captured.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from pipeline.model.denoiser import AudioVideoDenoiser, OthersFn
from pipeline.model.hparams import DenoiserHparams
from pipeline.model.sparse_attention import PatternInForce
from pipeline.model.streams import Conditioning, Perturbation, TokenStream

log = logging.getLogger("pipeline.model")

Velocities = tuple[Tensor | None, Tensor | None]
Call = Callable[[], Velocities]

NUM_KEPT = 4
"""Shapes of calls that are remembered. The graph of one holds the text's keys and values (1.2 GB for a 19B model and
1,024 text tokens) and what its call takes beside weights."""
GRAPH_BYTES = 3_000_000_000
"""What a graph of a 19B model is taken to hold: on one H200 1.26 GB more than the calls beside it at 8,160 tokens, and
their activations, which its pool has once more, 0.13 GB for each 1,000 tokens of up to 12,288."""
_NOT_READ = torch.empty(0)


class Recorder(NamedTuple):
    """Makes of a call what does its work again, into the same outputs; for tensors on one type of device.

    The call reads tensors that stay where they are, and what is in them at each time counts.
    """

    device_type: str
    record: Callable[[Call], Call]


def _record_on_cuda(call: Call) -> Call:
    graph = torch.cuda.CUDAGraph()
    # The outer context is for a capture that fails at its end, after which torch leaves its own stream current. Another
    # thread may allocate and wait for events meanwhile (it encodes the clip before), so only this one is watched.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        made = call()

    def replay() -> Velocities:
        graph.replay()
        return made

    return replay


ON_CUDA = Recorder("cuda", _record_on_cuda)


class GraphedDenoiser:
    """`AudioVideoDenoiser`, whose calls of fewer than `below_tokens` video tokens, all samples together, are replayed.

    The first call of a shape runs as ever, so that kernels are compiled and plans are made; the second is captured.
    What a graph cannot know passes through: perturbations and `others`. A call under a pattern of `in_force` has a
    graph of that pattern. The denoiser's modules must stay the ones they are; their tensors may be replaced and moved.
    Not thread-safe.
    """

    def __init__(
        self,
        denoiser: AudioVideoDenoiser,
        below_tokens: int,
        in_force: PatternInForce | None = None,
        recorder: Recorder = ON_CUDA,
    ) -> None:
        # How long the last capture took; None if it failed.
        self.capture_s: float | None = None
        self._denoiser = denoiser
        self._below_tokens = below_tokens
        self._in_force = in_force
        self._recorder = recorder
        self._is_allowed = True
        # Walking the modules takes 7 ms for 19B weights, and these 0.6 ms, which the device does not wait for.
        self._owners = [tensors for module in denoiser.modules() for tensors in (module._parameters, module._buffers)]
        self._weights_at: list[int] = []
        # By shape, the least recently used first: what answers a call; None after the first one.
        self._kept: OrderedDict[_Key, _Graph | AudioVideoDenoiser | None] = OrderedDict()

    @property
    def hparams(self) -> DenoiserHparams:
        return self._denoiser.hparams

    @property
    def num_graphs(self) -> int:
        return sum(isinstance(kept, _Graph) for kept in self._kept.values())

    def prepare(self, video: TokenStream | None, audio: TokenStream | None) -> Conditioning:
        """See `AudioVideoDenoiser.prepare`."""
        return self._denoiser.prepare(video, audio)

    def overlap_audio(self, stream: torch.cuda.Stream | None) -> None:
        """See `AudioVideoDenoiser.overlap_audio`."""
        self.forget()
        self._denoiser.overlap_audio(stream)

    def forget(self) -> None:
        """Give up all graphs; the device has their memory back once the allocator's unused memory is released."""
        self._kept.clear()

    def allow(self, is_allowed: bool) -> None:
        """If not, give up all graphs and make no more until they are allowed again."""
        self._is_allowed = is_allowed
        if not is_allowed:
            self.forget()

    def __call__(
        self,
        video: TokenStream | None,
        audio: TokenStream | None,
        conditioning: Conditioning | None = None,
        perturbations: Sequence[Perturbation] | None = None,
        others: OthersFn | None = None,
    ) -> Velocities:
        """See `AudioVideoDenoiser.forward`."""
        if conditioning is None or perturbations is not None or others is not None or not self._suits(video):
            return self._denoiser(video, audio, conditioning, perturbations, others)
        self._give_up_graphs_of_moved_weights()
        # A pattern is equal to itself alone, and as part of a key it lives as long as the graph that reads it.
        pattern = None if self._in_force is None else self._in_force.pattern
        key = (pattern, *_key((_read(video), _read(audio), conditioning)))
        if key not in self._kept:
            velocities = self._denoiser(video, audio, conditioning)
            self._kept[key] = None
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
            return velocities
        answer = self._kept[key] or self._captured(video, audio, conditioning)
        self._kept[key] = answer
        self._kept.move_to_end(key)
        return answer(video, audio, conditioning)

    def _suits(self, video: TokenStream | None) -> bool:
        if video is None or not self._is_allowed:
            return False
        num_tokens = video.tokens_BTC.shape[:2].numel()
        return num_tokens < self._below_tokens and video.tokens_BTC.device.type == self._recorder.device_type

    def _give_up_graphs_of_moved_weights(self) -> None:
        """Asked at each call, so that whoever fuses adapters or moves parts need not tell, and cannot forget to.

        Addresses alone count: whatever lies there is read by a replay as by a call.
        """
        at = [tensor.data_ptr() for owned in self._owners for tensor in owned.values() if tensor is not None]
        if at != self._weights_at:
            self._weights_at = at
            self._kept = OrderedDict.fromkeys(self._kept)

    def _captured(
        self, video: TokenStream | None, audio: TokenStream | None, conditioning: Conditioning
    ) -> _Graph | AudioVideoDenoiser:
        """A graph, or what it would have been captured from if that fails."""
        self.capture_s, started = None, time.monotonic()
        try:
            graph = _Graph(self._denoiser, (_read(video), _read(audio), conditioning), self._recorder)
        except RuntimeError as error:
            self.forget()
            if not isinstance(error, torch.OutOfMemoryError):
                # The next one would fail too, and torch's allocator does not always recover from it.
                self._below_tokens = 0
            facts = {"error": f"{type(error).__name__}: {error}", "tries_others": self._below_tokens > 0}
            log.warning("denoiser call not captured, runs without a graph", extra={"facts": facts})
            return self._denoiser
        self.capture_s = time.monotonic() - started
        log.info("denoiser call captured", extra={"facts": {"capture_s": self.capture_s}})
        return graph


_Key = tuple[object, ...]
_Given = tuple[TokenStream | None, TokenStream | None, Conditioning]


class _Graph:
    """A captured call, with the tensors that it reads: they have the strides of those that it was captured with."""

    def __init__(self, denoiser: AudioVideoDenoiser, given: _Given, recorder: Recorder) -> None:
        video, audio, conditioning = own = _mapped(given, _room_for)
        self._own_streams, self._own_conditioning = own[:2], conditioning
        self._filled_from: Callable[[], Conditioning | None] = lambda: None
        self._fill(*given)
        self._replay = recorder.record(lambda: denoiser(video, audio, conditioning))

    def __call__(self, video: TokenStream | None, audio: TokenStream | None, conditioning: Conditioning) -> Velocities:
        self._fill(_read(video), _read(audio), conditioning)
        # The next replay overwrites what this one made.
        video_BTC, audio_BTC = (None if made is None else made.clone() for made in self._replay())
        return video_BTC, audio_BTC

    def _fill(self, video: TokenStream | None, audio: TokenStream | None, conditioning: Conditioning) -> None:
        _copy(self._own_streams, (video, audio))
        # The same for all steps of a stage. A weak reference: the text of a clip that has ended need not be kept.
        if self._filled_from() is not conditioning:
            _copy(self._own_conditioning, conditioning)
            self._filled_from = ref(conditioning)


def _read(stream: TokenStream | None) -> TokenStream | None:
    """What a call reads of a stream; the rest has become its conditioning."""
    if stream is None:
        return None
    return replace(stream, positions_BAT2=_NOT_READ, text_BSD=_NOT_READ, text_mask_BS=None, attention_mask_BTT=None)


def _key(given: _Given) -> _Key:
    """Equal for calls whose kernels are the same: what is given, of which type, size and strides."""
    return tuple(None if x is None else (x.dtype, x.shape, x.stride()) for x in _tensors(given))


def _tensors(given: Any) -> Iterator[Tensor | None]:
    """All tensors of what is given, in its order, and None for what is not."""
    if given is None or isinstance(given, Tensor):
        yield given
        return
    parts = given if isinstance(given, tuple) else [getattr(given, field.name) for field in fields(given)]
    for part in parts:
        yield from _tensors(part)


def _mapped(given: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """What is given, with what `make` makes of each tensor in its place."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        return make(given)
    if isinstance(given, tuple):
        parts = [_mapped(part, make) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
    return replace(given, **{field.name: _mapped(getattr(given, field.name), make) for field in fields(given)})


def _room_for(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _copy(into: Any, given: Any) -> None:
    for own, x in zip(_tensors(into), _tensors(given), strict=True):
        if own is not None and x is not None:
            _unexpanded(own).copy_(_unexpanded(x))


def _unexpanded(x: Tensor) -> Tensor:
    """Without the repeats of an expanded axis, which lie at one place in memory."""
    for axis, stride in enumerate(x.stride()):
        if stride == 0:
            x = x.narrow(axis, 0, 1)
    return x
