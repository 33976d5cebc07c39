"""A Ray cluster on this machine whose nodes a test can kill and replace, and the processes that live on it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

from pipeline.cluster.ray_session import _descendants

RANK = b"ray::WorkerProcess"


@dataclass
class Nodes:
    """A head without room for workers, and nodes with `cpus_per_node` each."""

    cluster: Cluster
    cpus_per_node: float

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=self.cpus_per_node, object_store_memory=100 * 2**20)

    def kill(self, node: Any) -> None:
        """SIGKILL of the node's raylet; what lived on it follows by itself."""
        self.cluster.remove_node(node, allow_graceful=False)

    def ranks(self) -> list[int]:
        """Process ids of all ranks of all workers, on every node."""
        found = []
        for pid in _descendants(os.getpid()):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(RANK):
                    found.append(pid)
        return sorted(found)


def new_cluster(head: dict[str, Any]) -> Cluster:
    """A cluster of a head. Ray's helper notes its address in a default folder that a new machine does not have."""
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    return Cluster(initialize_head=True, head_node_args=head)


@contextmanager
def ray_nodes(num_nodes: int, cpus_per_node: float) -> Iterator[Nodes]:
    """The cluster within; afterwards nothing of it is left."""
    # Short, because the paths of Ray's sockets are bounded.
    with tempfile.TemporaryDirectory(prefix="rc-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        arguments = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20, "temp_dir": folder}
        cluster = new_cluster(arguments)
        try:
            nodes = Nodes(cluster, cpus_per_node)
            for _ in range(num_nodes):
                nodes.add()
            cluster.wait_for_nodes()
            yield nodes
        finally:
            cluster.shutdown()
