"""Which paths a submitted Ray job can reach and keep: refused before anything is sent, and again inside the job.

A submitted job runs in a folder that Ray unpacks for it and removes later. What is written there is lost, and what is
written to a node's own disk is scattered once workers run on several nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.config.jobs import RenderJob
from pipeline.errors import UsageError
from pipeline.storage.filesystem import is_local

# Ray's job supervisor gives every entrypoint, however it was submitted, its job's configuration in this variable.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_SUBMISSION_KEY = "job_submission_id"


def in_submitted_job(environ: Mapping[str, str]) -> bool:
    """Says if this process is the entrypoint of a job submitted to Ray, or one of its children."""
    return _SUBMISSION_KEY in environ.get(_JOB_CONFIG, "")


def refuse_lost_paths(job: RenderJob, *, in_package: Callable[[str], bool]) -> None:
    """UsageError if `job`, run as a submitted Ray job, would read or write a path that is not there or does not last.

    `in_package` says if a relative path, or a glob of one, names something in the job's own package.
    """
    for name, uri in (("output", job.output), ("report", job.report)):
        if uri is not None and _is_relative(uri):
            raise UsageError(
                f"{name} must be a URL or an absolute path in a submitted Ray job, got {uri!r}, which would lie in a "
                f"folder that Ray removes; give {name}=s3://bucket/folder, or a path on a disk that all nodes share"
            )
    if _is_relative(job.manifest) and not in_package(os.path.normpath(job.manifest)):
        raise UsageError(
            f"manifest must be a URL, an absolute path or inside the submitted package, got {job.manifest!r}, which is "
            "not in it; give manifest=s3://bucket/file.parquet, or put the file into the repository's folder"
        )
    if not job.model.built_here and _is_relative(job.model.folder):
        raise UsageError(
            f"model.folder must be absolute in a submitted Ray job, got {job.model.folder!r}; give the folder where "
            f"the files of {job.model.name} lie on the cluster's nodes"
        )


def refuse_scattered_output(job: RenderJob, num_nodes: int) -> None:
    """UsageError if the output is on a node's own disk and the cluster has several nodes, so several such disks."""
    if num_nodes > 1 and is_local(job.output) and not job.cluster.shared_output:
        raise UsageError(
            f"output must be a URL such as s3://bucket/folder on a cluster of {num_nodes} nodes, got {job.output!r}, "
            "which is another disk on each; or set cluster.shared_output=true if all nodes see the same folder there"
        )


def _is_relative(uri: str) -> bool:
    return is_local(uri) and not uri.startswith("file://") and not Path(uri).expanduser().is_absolute()
