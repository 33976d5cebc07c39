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
def device() -> str:
    """Skips where there is no Triton: it is made for Linux only."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    return DEVICE
