"""A stream on its way through the blocks, and its norms and residual sums, each one operation where they meet.

What a layer adds to the tokens is kept apart from them until the next norm asks for both: then sum and norm are one
pass. Who attends to what is in `block.py`.

Shape suffixes: B batch, T tokens of a stream, D channels of the stream, K distinct timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kernels.ops import OpSet
from kernels.rows import Modulation, ScaledRows
from pipeline.model.modulation import StreamModulation
from pipeline.model.streams import StreamConditioning


@dataclass(frozen=True, eq=False)
class Branch:
    """What a layer adds to the tokens, through a gate if it has one; the index names each token's row of the gate."""

    y_BTD: Tensor
    gate_BKD: Tensor | None = None
    index_BT: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StreamState:
    """A stream's tokens, what is yet to be added to them, and what all blocks of the step are given for it."""

    x_BTD: Tensor
    conditioning: StreamConditioning
    modulation: StreamModulation
    branch: Branch | None = None


def settled(state: StreamState, ops: OpSet) -> StreamState:
    """The state with its branch, if any, added to the tokens."""
    branch = state.branch
    if branch is None:
        return state
    x_BTD = ops.gated_residual(state.x_BTD, branch.y_BTD, branch.gate_BKD, branch.index_BT)
    return replace(state, x_BTD=x_BTD, branch=None)


def normed(
    state: StreamState, modulation: Modulation | None, eps: float, ops: OpSet, *, as_rows: bool
) -> tuple[StreamState, Tensor | ScaledRows]:
    """The settled state and its tokens normed and modulated, plain without a modulation.

    `as_rows` asks for float8 rows, which is possible but for a plain norm of tokens without a branch.
    """
    branch = state.branch
    if branch is not None:
        add = ops.gated_residual_norm_quantised if as_rows else ops.gated_residual_norm
        x_BTD, y = add(state.x_BTD, branch.y_BTD, branch.gate_BKD, branch.index_BT, modulation, eps)
        return replace(state, x_BTD=x_BTD, branch=None), y
    if modulation is None:
        return state, ops.rms_norm(state.x_BTD, eps)
    norm = ops.modulated_rms_norm_quantised if as_rows else ops.modulated_rms_norm
    return state, norm(state.x_BTD, *modulation, eps)
