"""What the failure of a call to an actor means for its worker."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from pipeline.cluster.rank_death import loss_by
from pipeline.errors import CheckpointMismatch
from tests.unit.test_worker_group import group_of, ready


def raised(error: Exception) -> RayTaskError:
    return RayTaskError("WorkerProcess.poll", f"Traceback\n{type(error).__name__}: {error}", error)


def test_a_call_that_raises_in_an_actor_that_was_ready_costs_the_worker() -> None:
    group = ready()
    loss = loss_by(raised(RuntimeError("can't start new thread")), group, group.ranks[1])
    assert (loss.fault, loss.error) == ("WorkerLost", None)
    assert loss.cause == "cpu-1 (rank 1 of group-0): RuntimeError: can't start new thread"


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'pipeline'"), CheckpointMismatch("3 missing")])
def test_before_that_it_is_what_the_set_up_met(error: Exception) -> None:
    group = group_of()
    loss = loss_by(raised(error), group, group.ranks[0])
    assert loss.error is not None and str(error) in str(loss.error)
    assert (loss.error is error) == isinstance(error, CheckpointMismatch)
