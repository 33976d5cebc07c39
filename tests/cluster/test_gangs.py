"""Workers of several ranks on real actors: lost, hung, parted and cancelled as a whole."""

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

from pipeline.cluster import node_agent
from pipeline.cluster.pool import Finished, Freed, PoolEvent, WorkerGone
from pipeline.errors import WorkerLost
from pipeline.records.outcome import Failed
from pipeline.storage.processes import start_ticks
from tests.cluster import workers
from tests.cluster.conftest import Farm, actor_pids, ending_rows
from tests.cluster.gang_worker import GangFactory

NewFarm = Callable[..., Farm]
# Two ranks on half a core each: these workers compute next to nothing.
A_PAIR = {"num_ranks": 2, "cpus_per_rank": 0.5, "num_workers": 1}


def attempts(rows: dict[str, dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["status"], row["attempts"]) for _, row in sorted(rows.items())]


def test_a_gang_that_loses_a_rank_is_ended_and_its_item_rendered_by_the_next(farm: NewFarm, tmp_path: Path) -> None:
    this = farm([f"die 1 rank 1 once {tmp_path / 'died'}", "render 0.1"], workers.obedient, **A_PAIR)
    assert attempts(ending_rows(this.run())) == [("rendered", 2), ("rendered", 1)]
    (lost,) = this.facts("worker_lost")
    assert lost["ids"] == ["row-0"] and "cpu-1 (rank 1 of group-0)" in lost["cause"]
    (ended,) = this.facts("worker_torn_down")
    assert ended["group"] == "group-0" and ended["processes_gone_s"] < 5 and ended["memory_free_s"] is None
    assert [facts["group"] for facts in this.facts("worker_ready")] == ["group-0", "group-1"]
    seats = [(seat.gpu_id, seat.group_id, seat.rank) for seat in this.log.seats]
    assert sorted(seats) == [("cpu-0", "group-0", 0), ("cpu-1", "group-0", 1),
                             ("cpu-2", "group-1", 0), ("cpu-3", "group-1", 1)]  # fmt: skip
    assert {e.gpu_id for e in this.log.entries if e.state == "denoise"} == {"cpu-0", "cpu-1", "cpu-2", "cpu-3"}


def test_a_rank_killed_in_a_collective_does_not_hold_up_its_siblings(farm: NewFarm) -> None:
    this = farm(["a boat"] * 2, GangFactory(num_steps=20, step_s=0.05), **A_PAIR)
    killed: list[tuple[set[int], float, float]] = []

    def kill_one() -> None:
        while not any(e.state == "denoise" for e in this.log.entries) and not this.facts("attempt_started"):
            time.sleep(0.02)
        time.sleep(0.4)
        pids = actor_pids()
        os.kill(random.Random(7).choice(pids), signal.SIGKILL)
        killed_s = time.monotonic()
        while any(start_ticks(pid) for pid in pids) and time.monotonic() < killed_s + 20:
            time.sleep(0.01)
        killed.append((set(pids), killed_s, time.monotonic()))

    killer = threading.Thread(target=kill_one)
    killer.start()
    rows = ending_rows(this.run())
    killer.join()
    ((pids, killed_s, gone_s),) = killed
    assert len(pids) == 2 and gone_s - killed_s < 5, "the other rank waits in its collective for ten minutes"
    assert attempts(rows) == [("rendered", 2), ("rendered", 1)]
    assert [facts["fault"] for facts in this.facts("worker_lost")] == ["WorkerLost"]
    assert not this.facts("attempt_failed") or "killed 1 worker" in this.facts("attempt_failed")[0]["error_message"]


def test_a_stopped_rank_is_a_hang_that_names_row_rank_and_step(farm: NewFarm, tmp_path: Path) -> None:
    this = farm([f"freeze 3 rank 1 once {tmp_path / 'froze'}"], workers.obedient, hang_after_s=1.5, **A_PAIR)
    assert attempts(ending_rows(this.run())) == [("rendered", 2)]
    (lost,) = this.facts("worker_lost")
    assert lost["fault"] == "Hang" and lost["ids"] == ["row-0"]
    assert "rank 1 of group-0" in lost["cause"] and 'of row "row-0"' in lost["cause"] and "of denoise" in lost["cause"]
    assert this.facts("worker_torn_down")[0]["processes_gone_s"] < 5, "a stopped process does not hear Ray"


def test_an_endless_loop_is_a_hang_and_an_item_that_hangs_twice_is_set_aside(farm: NewFarm) -> None:
    this = farm(["loop", "render 0.1"], workers.obedient, num_workers=1, hang_after_s=1.0)
    rows = ending_rows(this.run())
    assert [row["status"] for _, row in sorted(rows.items())] == ["failed", "rendered"]
    assert rows["row-0"]["error_class"] == "Hang"
    assert "gave no sign of life for 1 s after step 8 of 12 of denoise" in rows["row-0"]["error_message"]


def test_a_rank_that_fails_alone_costs_its_gang_but_not_the_item(farm: NewFarm, tmp_path: Path) -> None:
    this = farm([f"fail rank 1 once {tmp_path / 'failed'}", "render 0.1"], workers.obedient, **A_PAIR)
    assert attempts(ending_rows(this.run())) == [("rendered", 1), ("rendered", 1)]
    (lost,) = this.facts("worker_lost")
    assert lost["ids"] == [] and 'rank 1 failed alone at row "row-0": EngineFault: not finite' in lost["cause"]
    assert {e.group_id for e in this.log.entries if e.id == "row-1"} == {"group-1"}


def test_surplus_workers_are_given_back_while_the_last_one_works_but_for_one_to_race_it(farm: NewFarm) -> None:
    this = farm(["render 6", "render 0.2", "render 0.2"], workers.obedient, num_workers=3, cpus_per_rank=0.5)
    assert attempts(ending_rows(this.run())) == [("rendered", 1)] * 3
    (given_back,) = this.facts("worker_given_back")
    (ended,) = this.facts("worker_torn_down")
    assert ended["group"] == given_back["group"]
    (idle_seat,) = [seat for seat in this.log.seats if seat.group_id == given_back["group"]]
    last = max(e.t1_ns for e in this.log.entries if e.id == "row-0")
    assert idle_seat.released_ns is not None and idle_seat.released_ns < last
    assert not [e for e in this.log.entries if e.state == "unknown"] and not this.facts("worker_lost")


def test_a_cancelled_item_ends_on_all_four_ranks_and_their_gang_goes_on(farm: NewFarm) -> None:
    this = farm(["render 60", "render 0.1"], workers.obedient, num_ranks=4, cpus_per_rank=0.25, num_workers=1)
    pool, (endless, short) = this.pool, this.items

    def until(kind: type[PoolEvent]) -> PoolEvent:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            event = pool.next_event(0.1)
            assert not isinstance(event, WorkerGone), event
            if isinstance(event, kind):
                return event
        raise AssertionError(f"no {kind.__name__}")

    pool.want({endless.layout: 1})
    pool.start()
    until(Freed)
    pool.submit(endless)
    pool.next_event(0.3)
    pool.cancel(endless)
    cancelled = until(Finished)
    assert isinstance(cancelled, Finished) and isinstance(cancelled.outcome, Failed)
    assert cancelled.outcome.fault == "Cancelled"
    until(Freed)
    pool.submit(short)
    until(Finished)
    assert sorted(seat.rank for seat in pool.seats()) == [0, 1, 2, 3]
    pool.stop(abandon=False)


def test_a_gang_that_no_node_can_hold_is_a_clear_error(farm: NewFarm) -> None:
    this = farm(["render 0.1"], workers.obedient, num_ranks=4, num_workers=1, start_timeout_s=1.0)
    ending = this.driver.drive()
    assert ending.stopped_by is not None and ending.stopped_by.exit_code == 6
    message = str(ending.stopped_by)
    assert "1 of 1 workers found no place within 1 s; each asks for 4 x 1 CPU on one node" in message
    assert "has 2 CPU (2 free)" in message


def test_gpu_memory_that_a_lost_worker_left_held_at_the_only_place_ends_the_job_with_who_holds_it(
    farm: NewFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, nvidia_smi = tmp_path / "used", Path(os.environ["PATH"].partition(":")[0]) / "nvidia-smi"
    used.write_text("1000")
    nvidia_smi.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *compute-apps*) echo "GPU-a, 4321";; *) echo "GPU-a, $(cat {used})";; esac\n'
    )  # fmt: skip
    nvidia_smi.chmod(0o755)
    monkeypatch.setattr(node_agent, "FREE_S", 1.0)
    this = farm(["die", "render 0.1"], workers.obedient, device="cuda", num_workers=1)

    def leak() -> None:
        while not this.facts("attempt_started"):
            time.sleep(0.02)
        used.write_text("61000")

    threading.Thread(target=leak, daemon=True).start()
    ending = this.driver.drive()
    nvidia_smi.unlink()
    assert isinstance(ending.stopped_by, WorkerLost) and ending.stopped_by.exit_code == 6
    message = str(ending.stopped_by)
    assert f"GPU GPU-a still holds {60000 * 2**20} bytes more than before it, held by process 4321" in message
    (spoilt,) = this.facts("place_spoilt")
    assert spoilt["gpus"] == [{"gpu": "GPU-a", "held_bytes": 60000 * 2**20, "pids": (4321,)}]
    assert [seat.gpu_id for seat in this.log.seats] == ["cuda-0"], "nothing was started in its place"
