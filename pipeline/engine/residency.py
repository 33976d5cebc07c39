"""Moves parts of a model between host and device, as the memory plan says.

Weights keep one pinned copy on the host and lend the device another while they are used. Knows modules, not what they
compute; what waits where is decided in `memory.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Residency:
    """The parts that can wait on the host, and those that do: at first the ones in `on_host`. Not thread-safe."""

    def __init__(self, device: str, on_host: Collection[str] = ()) -> None:
        self._device = device
        self._on_host = on_host
        self._resident: dict[str, nn.Module] = {}
        self._waiting: dict[str, nn.Module] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the parts that wait on the host."""
        return tuple(self._waiting)

    def keep(self, name: str, module: nn.Module) -> None:
        """Take note of a loaded part that can wait; if it is to wait on the host, it goes there now."""
        self._resident[name] = module
        if name in self._on_host:
            self._send(name)

    def tighten(self) -> None:
        """Have every part that can wait do so, until `loosen`. None may be in use."""
        for name in tuple(self._resident):
            self._send(name)

    def loosen(self) -> None:
        """Only the parts of `on_host` wait from now on. None may be in use."""
        for name in self._waiting.keys() - set(self._on_host):
            module = self._resident[name] = self._waiting.pop(name)
            for tensor in _tensors(module):
                tensor.data = tensor.data.to(self._device)

    def release_unused(self) -> None:
        """Give the device's memory that nothing uses back to it, for what will be asked for in other sizes."""
        # A failure's traceback holds the tensors of its frames, in cycles that counting references never frees.
        gc.collect()
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def _send(self, name: str) -> None:
        module = self._waiting[name] = self._resident.pop(name)
        for tensor in _tensors(module):
            tensor.data = _on_host(tensor.data)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The part `name` is on the device within; nothing happens for a part that always is.

        Its weights may be replaced by others within, which then wait in their place; they may not be changed in place.
        """
        module = self._waiting.get(name)
        if module is None:
            yield
            return
        homes = {tensor: tensor.data for tensor in _tensors(module)}
        try:
            for tensor, home in homes.items():
                tensor.data = home.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor in _tensors(module):
                tensor.data = homes[tensor] if tensor in homes else _on_host(tensor.data)


# For models of which nothing waits.
ALL_RESIDENT = Residency("cpu")


def _on_host(tensor: Tensor) -> Tensor:
    if not torch.cuda.is_available():
        return tensor.detach()
    # Straight into pinned memory: by way of ordinary memory 24 GB took 28 s.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
