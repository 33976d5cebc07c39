"""Why a rank's actor no longer answers, from what Ray says of it."""

from __future__ import annotations

import ray
from ray.exceptions import RayTaskError

from pipeline.cluster.worker_group import Loss, Rank, WorkerGroup
from pipeline.errors import PipelineError, Preempted, WorkerLost

# The number of a preemption among Ray's reasons for the death of a node.
_PREEMPTED = 3


def loss_by(error: BaseException, group: WorkerGroup, rank: Rank) -> Loss:
    """What the failure of a call to `rank` means for its group."""
    if isinstance(error, RayTaskError):
        if rank.is_ready:
            return Loss(f"{group.name_of(rank)}: {_cause_of(error)}")
        failure = _setup_failure(rank.gpu_id, error)
        return Loss(str(failure), error=failure)
    fault = Preempted if _was_preempted(error, group.node_id) else WorkerLost
    return Loss(f"{group.name_of(rank)}: {_cause_of(error)}", fault.__name__)


def _setup_failure(gpu_id: str, error: RayTaskError) -> PipelineError:
    """What our own code in the actor raised: it cannot have got as far as the worker, which reports what it meets."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    if isinstance(cause, PipelineError):
        return cause
    reason = str(cause).partition("\n")[0]
    return WorkerLost(
        f"worker {gpu_id} could not start: {type(cause).__name__}: {reason}; "
        "this checkout must lie at the same path on every node, or be submitted with the job"
    )


def _was_preempted(error: BaseException, node_id: str | None) -> bool:
    """Ray says so with the actor's death while the node drains, later with the node's."""
    if getattr(error, "preempted", False):
        return True
    return any(node["NodeID"] == node_id and node["DeathReason"] == _PREEMPTED for node in ray.nodes())


def _cause_of(error: BaseException) -> str:
    """One line of what Ray says of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "Error" in line]
    return (telling or lines or [type(error).__name__])[-1][:300]
