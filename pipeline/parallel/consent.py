"""The lowest vote of all ranks, for `pipeline/accord.py`: over gloo, because a vote must not wait for a device."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

# A rank may wait for another that is kept by its store; who waits in vain is found out by the cluster.
PATIENCE = timedelta(days=7)


class GangConsent:
    """`Consent` over all ranks, or the lowest of any other whole numbers. Every rank must make it at the same point."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __call__(self, vote: int) -> int:
        """The lowest of all ranks' votes. RuntimeError if one of them is gone."""
        lowest = torch.tensor(vote)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._group)
        return int(lowest)
