"""What ranks exchange, as functions of tensors: heads for tokens, parts for the whole, a ring, one rank's for all.

Parts are of one size on all ranks; who has less pads, and takes the padding away before anything reads it. The same
functions run on gloo (CPU) and on NCCL. Along an axis of one rank they hand back what they are given.

Shape suffixes: B batch, H heads, T tokens of a rank, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.layout import Axis


def heads_for_tokens(x_BHTK: Tensor, axis: Axis) -> Tensor:
    """All heads of own tokens in, own heads of all the axis's tokens out: (B, H/n, n*T, K), tokens in order of rank.

    H must be divisible by n, the size of the axis. The result lies token by token (B, T, H, K), which spares copies: of
    one sample nothing is moved but to send it.
    """
    if axis.size == 1:
        return x_BHTK
    num_samples, num_heads, num_tokens, _ = x_BHTK.shape
    by_rank_nBThK = x_BHTK.unflatten(1, (axis.size, num_heads // axis.size)).permute(1, 0, 3, 2, 4)
    received_nBThK = _exchanged(by_rank_nBThK, axis)
    return received_nBThK.transpose(0, 1).reshape(
        num_samples, axis.size * num_tokens, *received_nBThK.shape[3:]
    ).transpose(1, 2)  # fmt: skip


def tokens_for_heads(x_BHTK: Tensor, axis: Axis) -> Tensor:
    """The way back: own heads of all tokens in, all heads of own tokens out, (B, n*H, T/n, K)."""
    if axis.size == 1:
        return x_BHTK
    num_samples, num_heads, num_tokens, num_channels = x_BHTK.shape
    by_rank_nBThK = (
        x_BHTK.transpose(1, 2)
        .reshape(num_samples, axis.size, num_tokens // axis.size, num_heads, num_channels)
        .transpose(0, 1)
    )
    received_nBThK = _exchanged(by_rank_nBThK, axis)
    return received_nBThK.permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The parts of all ranks one behind the other along `dim`, in order of rank."""
    if axis.size == 1:
        return x
    parts = torch.empty(axis.size, *x.shape, dtype=x.dtype, device=x.device)
    # torch 2.13 calls it by the first name and warns at the second, which is the only one in torch 2.11.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts.flatten(0, 1), x.contiguous(), group=axis.group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


@dataclass(frozen=True, eq=False)
class Passing:
    """A tensor on its way round the ring: sent to the next rank, awaited from the one before."""

    sent: Tensor
    received: Tensor
    works: Sequence[dist.Work]

    def finish(self) -> Tensor:
        """What the rank before sent. Until then nothing may write to what was sent."""
        for work in self.works:
            work.wait()
        return self.received


def pass_on(x: Tensor, ring: Axis) -> Passing:
    """Start sending x, contiguous, to the next rank of the ring and receiving as much from the one before."""
    received = torch.empty_like(x)
    after, before = (ring.ranks[(ring.index + step) % ring.size] for step in (1, -1))
    # In one batch: of two separate calls, NCCL would wait for the first, and so would all ranks.
    moves = [dist.P2POp(dist.isend, x, after, ring.group), dist.P2POp(dist.irecv, received, before, ring.group)]
    return Passing(x, received, dist.batch_isend_irecv(moves))


def swapped_with_neighbours(to_before: Tensor, to_after: Tensor, axis: Axis) -> tuple[Tensor | None, Tensor | None]:
    """What the rank before this one sends after it, and the one after it before it; None where there is no such rank.

    Unlike in a ring, the first rank has none before it, nor the last one after it.
    """
    received: list[Tensor | None] = []
    moves = []
    for x, index in ((to_before, axis.index - 1), (to_after, axis.index + 1)):
        if not 0 <= index < axis.size:
            received.append(None)
            continue
        sent = x.contiguous()
        into = torch.empty_like(sent)
        received.append(into)
        rank = axis.ranks[index]
        moves += [dist.P2POp(dist.isend, sent, rank, axis.group), dist.P2POp(dist.irecv, into, rank, axis.group)]
    for work in dist.batch_isend_irecv(moves) if moves else ():
        work.wait()
    before, after = received
    return before, after


def broadcast(tensors: Sequence[Tensor | None] | None, axis: Axis, device: str) -> list[Tensor | None]:
    """What the first rank of the axis has, on every rank; the others give None, as they need not know the shapes."""
    given = list(tensors or ())
    if axis.size == 1:
        return given
    kinds: list[list[tuple[torch.Size, torch.dtype] | None]] = [[x if x is None else (x.shape, x.dtype) for x in given]]
    dist.broadcast_object_list(kinds, axis.ranks[0], group=axis.group)
    if axis.index:
        given = [None if kind is None else torch.empty(kind[0], dtype=kind[1], device=device) for kind in kinds[0]]
    for x in given:
        if x is not None:
            dist.broadcast(x, axis.ranks[0], group=axis.group)
    return given


def _exchanged(by_rank: Tensor, axis: Axis) -> Tensor:
    """Part i of the first dimension goes to rank i of the axis; what comes from rank i is part i of the result."""
    sent = by_rank.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return received
