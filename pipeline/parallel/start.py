"""A process becomes a rank, and stops being one: meeting the others, binding its device, connecting, leaving.

Who starts processes and what follows when one dies is the cluster's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.parallel.collectives import gathered, heads_for_tokens, pass_on, swapped_with_neighbours
from pipeline.parallel.layout import RankGroups, form_groups
from pipeline.records.gang import Member
from pipeline.records.parallel import ParallelLayout


def join(member: Member, layout: ParallelLayout, device: str, timeout_s: float) -> RankGroups:
    """Meet the other ranks, form the groups of the layout and connect them all.

    `device` is cpu (gloo), cuda or cuda:0 (NCCL). Connections take of its memory: that is taken when this returns.

    A collective that not all ranks have come to after `timeout_s` fails: on gloo it raises RuntimeError, on NCCL it
    ends the process. RuntimeError if the ranks do not meet within that time; UsageError, on every rank, if they are not
    as many as the layout wants.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        member.host,
        member.port,
        member.num_ranks,
        is_master=member.is_leader,
        master_listen_fd=member.listen_fd,
        timeout=timeout,
    )
    place = torch.device(device)
    is_cuda = place.type == "cuda"
    if is_cuda:
        place = torch.device("cuda", place.index or 0)
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=member.rank,
        world_size=member.num_ranks,
        timeout=timeout,
    )
    try:
        groups = form_groups(layout, timeout)
        _connect(groups, place)
        return groups
    except BaseException:
        dist.destroy_process_group()
        raise


def _connect(groups: RankGroups, device: torch.device) -> None:
    """Talk in every group, in the ways in which its ranks will.

    NCCL makes a communicator at its first collective, and the way to a peer at the first message that takes it. Each
    takes memory of the device, and only then is it known whether the peer can be reached.
    """
    x = torch.zeros(1, device=device)
    for group in groups.groups:
        dist.all_reduce(x, group=group)
    for axis in groups.axes:
        gathered(x, axis, dim=0)
    for ulysses in (groups.sequence.ulysses, groups.audio.ulysses):
        heads_for_tokens(torch.zeros(1, ulysses.size, 1, 1, device=device), ulysses)
    if groups.sequence.ring.size > 1:
        pass_on(x, groups.sequence.ring).finish()
    # As when a picture's rows are shared (`rows.py`).
    swapped_with_neighbours(x, x, groups.world)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leave(groups: RankGroups) -> None:
    """Stop being a rank. On gloo, others that wait for this one fail at once, with RuntimeError.

    On NCCL they wait for their timeout: there, a process whose rank failed alone had better end.
    """
    for axis in groups.axes:
        axis.group = None
    dist.destroy_process_group()


@contextmanager
def joined(member: Member, layout: ParallelLayout, device: str, timeout_s: float) -> Iterator[RankGroups]:
    """A rank for as long as the block lasts; see `join`."""
    groups = join(member, layout, device, timeout_s)
    try:
        yield groups
    finally:
        leave(groups)
