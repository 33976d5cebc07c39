"""Moves parts of a model between host and device, as the memory plan says.

Weights keep one pinned copy on the host and lend the device another while they are used. Knows modules, not what they
compute; what waits where is decided in `memory.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Residency:
    """The parts that wait on the host. Not thread-safe."""

    def __init__(self, waiting: Mapping[str, nn.Module], device: str, *, changing: Collection[str] = ()) -> None:
        """`changing` names the parts whose weights may differ after a use: those are copied back."""
        self._device = device
        self._waiting = waiting
        self._changing = changing
        for module in waiting.values():
            for tensor in _tensors(module):
                tensor.data = _on_host(tensor.data)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The part `name` is on the device within; nothing happens for a part that always is."""
        module = self._waiting.get(name)
        if module is None:
            yield
            return
        homes = [(tensor, tensor.data) for tensor in _tensors(module)]
        try:
            for tensor, home in homes:
                tensor.data = home.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, home in homes:
                if name in self._changing:
                    home.copy_(tensor.data)
                tensor.data = home


def _on_host(tensor: Tensor) -> Tensor:
    host = tensor.detach().to("cpu")
    return host.pin_memory() if torch.cuda.is_available() else host


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
