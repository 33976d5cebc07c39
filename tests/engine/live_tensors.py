"""Counts the bytes of tensors that are alive, the most at any moment: an allocator's peak, where none is told."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within, every operation's results count from then on, each storage once, until the last tensor on it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._num_tensors: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                self._count(tensor)
        return results

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._num_tensors:
            self._live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        self._num_tensors[key] = self._num_tensors.get(key, 0) + 1
        weakref.finalize(tensor, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._num_tensors[key] -= 1
        if not self._num_tensors[key]:
            del self._num_tensors[key]
            self._live_bytes -= num_bytes
