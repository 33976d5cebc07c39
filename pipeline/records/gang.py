"""Who a process is within its gang: the ranks that hold one model together, and where they meet."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.records.parallel import ParallelLayout


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a gang that holds a model in `layout`. Ranks meet at `host`:`port`.

    The leader (rank 0) holds a listening socket of that port as `listen_fd`, so that nobody else can take the port
    before its server does (`torch.distributed.TCPStore(..., master_listen_fd=)`); it is None for the other ranks.
    """

    rank: int = 0
    num_ranks: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    listen_fd: int | None = None
    layout: ParallelLayout = ParallelLayout()

    @property
    def is_leader(self) -> bool:
        return self.rank == 0


ALONE = Member()
