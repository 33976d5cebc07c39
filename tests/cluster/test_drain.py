"""A node of a two-node cluster that is about to be taken away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.cluster import workers
from tests.cluster.conftest import NODE, Farm, ending_rows

NewFarm = Callable[..., Farm]


@pytest.fixture
def second_node(two_cpus: Cluster) -> Iterator[Any]:
    node = two_cpus.add_node(num_cpus=1, **NODE)
    two_cpus.wait_for_nodes()
    yield node
    two_cpus.remove_node(node)


def drain_when_all_work(farm: Farm, address: str, node_id: str, num_attempts: int, notice_s: float) -> None:
    """What `ray drain-node` does for a spot machine that goes in `notice_s`."""

    def drain() -> None:
        while len(farm.facts("attempt_started")) < num_attempts:
            time.sleep(0.02)
        time.sleep(0.3)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        until_ms = round((time.time() + notice_s) * 1e3)
        accepted, why_not = ray._raylet.GcsClient(address=address).drain_node(node_id, reason, "spot", until_ms)
        assert accepted, why_not

    threading.Thread(target=drain, daemon=True).start()


def test_what_fits_the_notice_finishes_and_nothing_new_starts_there(
    farm: NewFarm, two_cpus: Cluster, second_node: Any
) -> None:
    this = farm(["render 2.5"] * 5, workers.obedient, num_workers=3)
    drain_when_all_work(this, two_cpus.address, second_node.node_id, 3, notice_s=60)
    rows = ending_rows(this.run())
    assert {(row["status"], row["attempts"]) for row in rows.values()} == {("rendered", 1)}
    (notice,) = this.facts("node_draining")
    assert notice["node"] == second_node.node_id and 50 < notice["left_s"] < 60
    (group,) = notice["groups"]
    assert group in {facts["group"] for facts in this.facts("worker_given_back")}
    noticed_ns = this.log.first_ns["node_draining"]
    assert all(e.t0_ns < noticed_ns for e in this.log.entries if e.group_id == group and e.state == "denoise")
    assert not this.facts("worker_lost")


def test_what_does_not_fit_is_taken_back_without_a_mark_before_the_node_goes(
    farm: NewFarm, two_cpus: Cluster, second_node: Any
) -> None:
    this = farm(["render 5"] * 3, workers.obedient, num_workers=3)
    drain_when_all_work(this, two_cpus.address, second_node.node_id, 3, notice_s=3.5)
    rows = ending_rows(this.run())
    assert sorted((row["status"], row["attempts"]) for row in rows.values()) == [("rendered", 1)] * 2 + [
        ("rendered", 2)
    ]
    (lost,) = this.facts("worker_lost")
    assert lost["fault"] == "Preempted" and len(lost["ids"]) == 1
    (failed,) = this.facts("attempt_failed")
    assert failed["next"] == "take back"
    ended = this.facts("worker_torn_down")[0]
    assert ended["processes_gone_s"] < 5, "seen by the agent on that node"


def test_a_node_that_dies_without_notice_costs_its_rows_one_attempt(
    farm: NewFarm, two_cpus: Cluster, second_node: Any
) -> None:
    this = farm(["render 3"] * 3, workers.obedient, num_workers=3)

    def kill() -> None:
        while len(this.facts("attempt_started")) < 3:
            time.sleep(0.02)
        time.sleep(0.3)
        second_node.kill_raylet()

    threading.Thread(target=kill, daemon=True).start()
    rows = ending_rows(this.run())
    assert {row["status"] for row in rows.values()} == {"rendered"}
    (lost,) = this.facts("worker_lost")
    assert lost["fault"] == "WorkerLost" and len(lost["ids"]) == 1
