"""Where the kernels run in these tests: on a GPU if there is one, else on the CPU by Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set here, before any kernel is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device(monkeypatch) -> str:
    """Skips where there is no Triton: it is made for Linux only."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    if DEVICE == "cpu":
        multiply_numbers_of_bfloat16(monkeypatch)
    return DEVICE


def multiply_numbers_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers of the same bits, and its matrix product multiplies the integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)
    )
