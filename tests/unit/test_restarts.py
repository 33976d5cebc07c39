"""How soon lost workers are replaced, and what ends the job instead."""

from __future__ import annotations

from pipeline.cluster.restarts import Restarts
from pipeline.errors import CheckpointMismatch, StorageUnavailable


def test_the_wait_doubles_up_to_a_minute_while_no_worker_becomes_ready() -> None:
    restarts, now_s, waits = Restarts(), 100.0, []
    assert restarts.may_start(now_s)
    for _ in range(8):
        restarts.worker_lost(now_s)
        lost_s = now_s
        while not restarts.may_start(now_s):
            now_s += 0.5
        waits.append(now_s - lost_s)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_workers_that_are_lost_together_count_once() -> None:
    restarts = Restarts()
    for index in range(8):
        restarts.worker_lost(100.0 + index / 10)
    assert not restarts.may_start(100.9) and restarts.may_start(101.0)


def test_a_worker_that_becomes_ready_ends_the_wait() -> None:
    restarts = Restarts()
    restarts.worker_lost(100.0)
    restarts.worker_ready()
    assert restarts.may_start(100.0)
    restarts.worker_lost(100.0)
    assert restarts.may_start(101.0)


def test_wrong_input_ends_the_job_and_a_store_that_is_away_does_not() -> None:
    restarts = Restarts()
    restarts.worker_ready()
    assert restarts.ends_job(CheckpointMismatch("tensors differ"), others_start=True)
    assert not restarts.ends_job(StorageUnavailable("no route"), others_start=False)


def test_an_error_of_nobody_is_a_bug_only_if_it_left_no_worker() -> None:
    restarts, error = Restarts(), RuntimeError("CUDA error: device-side assert")
    assert restarts.ends_job(error, others_start=False)
    assert not restarts.ends_job(error, others_start=True)
    restarts.worker_ready()
    assert not restarts.ends_job(error, others_start=False)
