"""The error classes of the pipeline. The class decides what happens next, never the text.

What follows a failed attempt is in `planning/policy.py`; `exit_code` is what a job ends with when the error reaches
its top (README, "The contract").
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of every error this project raises on purpose. Its text is written for the operator."""

    exit_code = 6


class UsageError(PipelineError):
    """A command, configuration, path or model file that cannot work as given; nothing was started."""

    exit_code = 2


class CheckpointMismatch(UsageError):
    """A checkpoint's tensors or metadata are not what the model needs; lists every difference."""


class InvalidRequest(PipelineError):
    """A manifest row that cannot be rendered as asked. `problems` holds every reason, one sentence each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[tuple[str, ...]]]:
        # Exceptions are rebuilt from their text, which this one does not take.
        return type(self), (self.problems,)


class EngineFault(PipelineError):
    """The renderer produced something it must not (non-finite latents, a wrong frame count, a broken file)."""


class OutOfMemory(PipelineError):
    """The work did not fit the memory of its worker."""


class DeviceBroken(PipelineError):
    """The device of a worker gives no results any more; only a new process may help, so the worker ends."""


class StorageUnavailable(PipelineError):
    """The store refused or lost a write and may accept it later."""


class StorageFull(PipelineError):
    """The output's disk is full: no later row can be written either, so the job stops, resumable."""


class WorkerLost(PipelineError):
    """A worker ended without an answer."""


class Hang(PipelineError):
    """A worker gave no sign of life for longer than the work it does explains."""


class Preempted(PipelineError):
    """The machine of a worker was taken away, or will be: nobody's fault."""


class Cancelled(PipelineError):
    """An attempt was given up because the driver asked for it."""


class UnexpectedFailure(PipelineError):
    """A bug, met where it could still be recorded; its cause carries the traceback."""

    exit_code = 1


class Interrupted(PipelineError):
    """The operator or the cluster asked the job to stop; what is committed stays, the rest is resumable."""

    exit_code = 5


# The classes that the failure policy decides by; an error that is none of ours counts as an engine fault, because a
# bug met by one row must not end the night for the others.
FAULTS: tuple[type[PipelineError], ...] = (
    InvalidRequest,
    OutOfMemory,
    StorageFull,
    StorageUnavailable,
    UsageError,
    EngineFault,
    WorkerLost,
    Hang,
    Preempted,
    Cancelled,
)


def fault_of(error: BaseException) -> str:
    """The name of the failure class that `error` counts as."""
    if isinstance(error, MemoryError):
        return OutOfMemory.__name__
    return next((cls.__name__ for cls in FAULTS if isinstance(error, cls)), EngineFault.__name__)
