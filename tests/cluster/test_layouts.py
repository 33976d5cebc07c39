"""Workers of several sizes in one job, on real actors: started side by side, and given back for each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.planning.queue import WorkQueue
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import Estimate, Offer
from tests.cluster import workers
from tests.cluster.conftest import Farm, ending_rows
from tests.cluster.gang_worker import GangFactory

NewFarm = Callable[..., Farm]
ONE, TWO = ParallelLayout(), ParallelLayout(ulysses=2)
TOO_LARGE = "92 GB do not fit one card of 80 GB"


def offers(alone_s: float, misfit: str = "") -> tuple[Offer, ...]:
    """On one rank, and on two that take as long: the one of two is made for the row that does not fit one."""
    return (
        Offer(ONE, Estimate(1e12, alone_s, 0.01, "uncalibrated"), misfit),
        Offer(TWO, Estimate(1e12, 2 * alone_s, 0.02, "uncalibrated", num_gpus=2)),
    )


def plan(this: Farm, *offered: tuple[Offer, ...]) -> None:
    """Give each item of the farm its offers."""
    this.items[:] = [
        replace(item, estimate=each[-1].estimate if each[0].misfit else each[0].estimate, offers=each)
        for item, each in zip(this.items, offered, strict=True)
    ]
    this.driver.queue = WorkQueue(this.items)
    this.driver.__post_init__()


def test_a_job_holds_workers_of_one_and_of_two_ranks_at_once(farm: NewFarm) -> None:
    this = farm(["render 1"] * 3, workers.obedient, num_workers=4, cpus_per_rank=0.5)
    plan(this, offers(20.0, TOO_LARGE), offers(10.0), offers(10.0))
    rows = ending_rows(this.run())
    assert [(row["parallel"], row["num_gpus"]) for _, row in sorted(rows.items())] == [
        ("ulysses2", 2), ("single", 1), ("single", 1),
    ]  # fmt: skip
    assert rows["row-0"]["parallel_reason"] == f"2 GPUs: {TOO_LARGE}"
    assert sorted((seat.group_id, seat.rank) for seat in this.log.seats) == [
        ("group-0", 0), ("group-0", 1), ("group-1", 0), ("group-2", 0),
    ]  # fmt: skip
    assert not this.facts("worker_given_back"), "nobody was in another's way"
    busy_s = {row: sum(e.gpu_seconds for e in this.log.entries if e.id == row) for row in rows}
    assert busy_s["row-0"] > 1.5 * busy_s["row-1"], "each rank of the pair is accounted for"


def test_single_workers_are_given_back_for_a_pair_that_has_no_other_place(farm: NewFarm) -> None:
    this = farm(["render 0.5"] * 3, workers.obedient, num_workers=2)
    plan(this, offers(20.0)[:1], offers(20.0)[:1], offers(1.0, TOO_LARGE))
    rows = ending_rows(this.run())
    assert [row["num_gpus"] for _, row in sorted(rows.items())] == [1, 1, 2]
    of_the_pair = [e for e in this.log.entries if e.id == "row-2"]
    (pair,) = {e.group_id for e in of_the_pair}
    began_ns = min(e.t0_ns for e in of_the_pair)
    assert {e.rank for e in of_the_pair} == {0, 1}
    singles = [seat for seat in this.log.seats if seat.group_id != pair]
    assert singles and all(seat.released_ns is not None and seat.released_ns <= began_ns for seat in singles)
    assert this.facts("worker_given_back") and not this.facts("worker_lost")


def test_two_gangs_that_start_at_once_on_one_node_meet_at_ports_of_their_own(farm: NewFarm) -> None:
    """Each leader's port is the system's choice, and held from then on until the gang's own server listens on it."""
    this = farm(["a boat"] * 4, GangFactory(num_steps=10, step_s=0.05), num_ranks=2, num_workers=2, cpus_per_rank=0.5)
    rows = ending_rows(this.run())
    assert [(row["status"], row["attempts"]) for row in rows.values()] == [("rendered", 1)] * 4
    assert {e.group_id for e in this.log.entries if e.state == "denoise"} == {"group-0", "group-1"}
