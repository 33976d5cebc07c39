"""The Ray pool with real actors and workers that need no model."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.errors import CheckpointMismatch, Interrupted, StorageUnavailable, UnexpectedFailure, WorkerLost
from tests.cluster import workers
from tests.cluster.conftest import Farm, actor_pids, ending_rows

NewFarm = Callable[..., Farm]
SEED = int(os.environ.get("CHAOS_SEED", "20261120"))


def statuses(rows: dict[str, dict[str, Any]]) -> list[str]:
    return [row["status"] for _, row in sorted(rows.items())]


def test_items_are_handed_out_in_order_to_two_workers_that_work_at_the_same_time(farm: NewFarm) -> None:
    this = farm(["render 0.5"] * 6, workers.obedient)
    rows = ending_rows(this.run())
    assert statuses(rows) == ["rendered"] * 6
    handed_out = [facts["id"] for event, facts in this.log.events if event == "attempt_started"]
    assert handed_out == [f"row-{index}" for index in range(6)]
    assert len({row["text_encode_s"] for row in rows.values()}) == 2, "two processes"
    spans = [(e.t0_ns, e.t1_ns, e.gpu_id) for e in this.log.entries if e.state == "denoise"]
    assert any(a[2] != b[2] and a[0] < b[1] and b[0] < a[1] for a in spans for b in spans)
    assert not [e for e in this.log.entries if e.state == "unknown"]


def test_an_item_whose_worker_dies_is_rendered_by_another(farm: NewFarm, tmp_path: Path) -> None:
    this = farm([f"die once {tmp_path / 'died'}", "render 0.1", "render 0.1"], workers.obedient)
    rows = ending_rows(this.run())
    assert statuses(rows) == ["rendered"] * 3
    assert [rows[f"row-{index}"]["attempts"] for index in range(3)] == [2, 1, 1]
    (lost,) = this.facts("worker_lost")
    assert lost["ids"] == ["row-0"] and lost["fault"] == "WorkerLost" and "cpu-" in lost["cause"]
    (unknown,) = [e for e in this.log.entries if e.state == "unknown"]
    assert unknown.gpu_seconds < 2
    assert [e.id for e in this.log.entries if e.gpu_id == unknown.gpu_id and e.state == "denoise"].count("row-0") == 1


def test_an_item_that_kills_two_workers_is_set_aside_and_the_others_are_rendered(farm: NewFarm) -> None:
    rows = ending_rows(farm(["die", "render 0.1", "render 0.1"], workers.obedient).run())
    assert statuses(rows) == ["failed", "rendered", "rendered"]
    assert rows["row-0"]["error_class"] == "WorkerLost" and rows["row-0"]["attempts"] == 2
    assert rows["row-0"]["error_message"].startswith("killed 2 workers: cpu-")


def test_workers_killed_from_outside_at_random_moments_lose_no_row(farm: NewFarm) -> None:
    this = farm(["render 0.4"] * 10, workers.obedient)
    generator, over, killed, ended_before = random.Random(SEED), threading.Event(), [], [0]

    def kill_now_and_then() -> None:
        """One kill after each item that ended: faster than workers can start, the job would rightly give up."""
        while len(killed) < 5 and not over.wait(generator.uniform(0.1, 1.0)):
            pids, num_ended = actor_pids(), len(this.driver.ending.rows)
            if pids and num_ended > ended_before[-1]:
                ended_before.append(num_ended)
                killed.append(generator.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        rows = ending_rows(this.run())
    finally:
        over.set()
        killer.join()
    assert len(rows) == 10 and set(statuses(rows)) <= {"rendered", "failed"}
    assert killed
    assert all("killed 2 workers" in row["error_message"] for row in rows.values() if row["status"] == "failed")


def test_a_worker_that_cannot_be_set_up_ends_the_job_with_its_own_error(farm: NewFarm) -> None:
    ending = farm(["render 0.1"], workers.mismatched).run()
    assert isinstance(ending.stopped_by, CheckpointMismatch) and ending.stopped_by.exit_code == 2
    assert str(ending.stopped_by) == "tensors differ: 3 missing"


def test_a_bug_in_a_workers_set_up_crosses_the_border_with_its_traceback(farm: NewFarm) -> None:
    ending = farm(["render 0.1"], workers.buggy, num_workers=1).run()
    assert isinstance(ending.stopped_by, UnexpectedFailure) and "ZeroDivisionError: oops" in str(ending.stopped_by)
    assert "in buggy" in "".join(getattr(ending.stopped_by.__cause__, "__notes__", []))


@pytest.mark.parametrize("error", [StorageUnavailable("no route to the models"), RuntimeError("CUDA error")])
def test_one_worker_that_cannot_be_set_up_is_replaced(farm: NewFarm, tmp_path: Path, error: Exception) -> None:
    """Of nobody's errors that holds while another worker is on its way; alone it would be a bug."""
    this = farm(["render 0.5"] * 4, workers.OnceBroken(tmp_path / "broken", error))
    assert statuses(ending_rows(this.run())) == ["rendered"] * 4
    (lost,) = this.facts("worker_lost")
    assert lost["ids"] == [] and f"{type(error).__name__}: {error}" in lost["cause"]


def test_workers_that_all_die_in_their_set_up_end_the_job_with_the_cause(farm: NewFarm) -> None:
    ending = farm(["render 0.1"], workers.dying, num_workers=1).run()
    assert isinstance(ending.stopped_by, WorkerLost) and ending.stopped_by.exit_code == 6
    assert "4 workers were lost while they started or waited" in str(ending.stopped_by)


def test_more_workers_than_there_is_room_for_are_waited_for_while_the_others_work(
    farm: NewFarm, caplog: pytest.LogCaptureFixture
) -> None:
    this = farm(["render 3.5"] * 4, workers.obedient, num_workers=3, start_timeout_s=5.0)
    assert statuses(ending_rows(this.run())) == ["rendered"] * 4
    assert "going on with fewer workers: 1 of 3 workers found no place within 5 s" in caplog.text


def test_a_cluster_without_free_resources_is_a_clear_error_in_bounded_time(farm: NewFarm) -> None:
    @ray.remote(num_cpus=2)
    class Neighbour:
        def is_here(self) -> bool:
            return True

    neighbour = Neighbour.remote()
    assert ray.get(neighbour.is_here.remote())
    this = farm(["render 0.1"], workers.obedient, num_workers=1, start_timeout_s=1.5)
    started_s = time.monotonic()
    ending = this.driver.drive()
    assert time.monotonic() - started_s < 4
    ray.kill(neighbour)
    assert ending.stopped_by is not None and ending.stopped_by.exit_code == 6
    message = str(ending.stopped_by)
    assert "1 of 1 workers found no place within 1.5 s; each asks for 1 CPU" in message
    assert "has 2 CPU (0 free)" in message


def test_left_to_itself_the_pool_takes_a_worker_a_core_but_no_more_than_clips(farm: NewFarm) -> None:
    for num_items, num_seats in ((1, 1), (3, 2)):
        this = farm(["render 0.1"] * num_items, workers.obedient, num_workers=None)
        assert statuses(ending_rows(this.run())) == ["rendered"] * num_items
        assert len(this.log.seats) == num_seats


def test_an_abandoned_pool_is_gone_at_once_and_its_ledger_closed(farm: NewFarm) -> None:
    this = farm(["render 60"] * 2, workers.obedient)

    def interrupt() -> None:
        while sum(event == "attempt_started" for event, _ in this.log.events) < 2:
            time.sleep(0.02)
        this.asked_s = time.monotonic()  # type: ignore[attr-defined]
        this.stop.reason = "interrupted"

    threading.Thread(target=interrupt, daemon=True).start()
    ending = this.driver.drive()
    took_s = time.monotonic() - this.asked_s  # type: ignore[attr-defined]
    assert isinstance(ending.stopped_by, Interrupted) and took_s < 1.5
    assert not actor_pids()
    assert set(statuses(ending_rows(ending))) == {"not_started"}
