"""Which layouts are tried, and how near to one rank they must come."""

from __future__ import annotations

from torch import Tensor

# Largest error over largest value: what float32 sums in another order differ by, with room for ten steps.
BOUND = 1e-5
LAYOUTS = ("ulysses2", "ring2", "guidance2", "ring3", "guidance3", "ulysses4", "ring4", "guidance4", "ring2_ulysses2",
           "guidance2_ulysses2", "guidance2_ring2")  # fmt: skip


def assert_equal_up_to_rounding(got: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for mine, single in zip(got, expected, strict=True):
        assert (mine is None) == (single is None)
        if mine is not None and single is not None:
            assert mine.shape == single.shape
            error = float((mine - single).abs().max() / single.abs().max())
            assert error <= BOUND, f"off by {error:.1e} of the scale"
