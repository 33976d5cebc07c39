"""Submit `jobs.render` to a Ray cluster, follow it, and end with the render's own exit code.

`python -m jobs.submit address=http://host:8265 [settings of jobs.render]`. Nothing is sent before the settings, the
paths, the package and the environment are known to be good.
"""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import difflib
import fnmatch
import logging
import os
import re
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from jobs.entry import RenderJob, SubmitJob, compose_job, run_job
from jobs.following import StopFlag, follow
from pipeline.errors import PipelineError, UsageError
from pipeline.planning.reach import refuse_lost_paths, refuse_scattered_output

ROOT = Path(__file__).resolve().parent.parent
OWN_KEYS = ("address", "wait", "submission_id", "env")
PRINTING_FLAGS = {"--help", "-h", "--cfg"}
MAX_PACKAGE_BYTES = 20_000_000
# Seconds to connect and to wait for the next byte. Ray's client has no limit of its own, so that a wrong address that
# swallows packets would hang for minutes; the first request is short and finds that out.
FIRST_TIMEOUT_S = (4.0, 5.0)
TIMEOUT_S = (10.0, 60.0)
TOKEN_WAY_OUT = (
    "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file with it, or put it into "
    "~/.ray/auth_token (`ray get-auth-token` prints it on the head node)"
)


class Cluster(JobSubmissionClient):
    """Ray's client with a time limit on every request."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        options.setdefault("timeout", FIRST_TIMEOUT_S if endpoint == "/api/version" else TIMEOUT_S)
        return super()._do_request(method, endpoint, **options)

    def num_nodes(self) -> int:
        """How many nodes are alive, by the service behind `ray list nodes`."""
        alive = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        answer = self._do_request("GET", f"/api/v0/nodes?{alive}")
        answer.raise_for_status()
        return len(answer.json()["data"]["result"]["result"])


def main(argv: list[str]) -> int:
    own = [argument for argument in argv if argument.partition("=")[0] in OWN_KEYS]
    overrides = [argument for argument in argv if argument not in own]
    if flags := PRINTING_FLAGS & set(argv):
        with suppress(SystemExit):
            compose_job(SubmitJob, "submit", [*own, *flags])
        compose_job(RenderJob, "render", overrides)
    command = compose_job(SubmitJob, "submit", own)
    _refuse_misspelt(overrides)
    job = compose_job(RenderJob, "render", overrides)
    package = package_files(ROOT)
    refuse_lost_paths(job, in_package=lambda path: _names_something(path, package))
    _refuse_large(package)
    env_vars = _environment(command.env, os.environ)
    cluster = connect(command.address)
    refuse_scattered_output(job, _num_nodes(cluster, command.address))
    job_id = command.submission_id or f"render-{uuid.uuid4().hex[:12]}"
    stop = StopFlag()
    if command.wait:
        stop.install(job_id)
    _submit(cluster, job_id, entrypoint(overrides), env_vars)
    if not command.wait:
        sys.stdout.write(f"{job_id}\n")
        return 0
    sys.stderr.write(f"submitted job {job_id} to {command.address}\n")
    return follow(cluster, job_id, command.address, stop)


def _refuse_misspelt(overrides: list[str]) -> None:
    """Whatever is not a key of ours is checked as one of jobs.render, which would suggest the wrong name."""
    for argument in overrides:
        key = argument.partition("=")[0]
        if near := difflib.get_close_matches(key, OWN_KEYS, n=1, cutoff=0.75):
            raise UsageError(f"{key!r} is not a setting of jobs.submit; did you mean {near[0]}?")


def entrypoint(overrides: list[str]) -> str:
    """The job's shell command: each argument exactly as given, whatever it holds."""
    return shlex.join(["python", "-m", "jobs.render", *overrides])


def package_files(root: Path) -> dict[str, int]:
    """Every file that Ray would package of `root`, with its size in bytes; Ray packages without compressing."""
    files: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.stat().st_size

    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    left_out = [packaging._get_excludes(root, get_runtime_env_default_excludes())]
    quiet = logging.getLogger("jobs.submit.package")
    packaging._dir_travel(root, left_out, note, include_gitignore=with_gitignore, logger=quiet)
    return files


def connect(address: str) -> Cluster:
    """A client of the cluster behind `address`, with Ray's own token where there is one."""
    # Ray would take these instead of the address that was given.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    try:
        return Cluster(address, headers=_token_header(address))
    except AuthenticationError as error:
        raise _refused_token(address, error) from error
    # A server that is not Ray's answers with anything, so with any of these.
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"address must be the dashboard of a running Ray cluster, got {address!r}: {_first_line(error)}; "
            "check host and port (8265 by default), and that a port-forward is up"
        ) from error


def _token_header(address: str) -> dict[str, str]:
    """Ray's token, from wherever Ray takes it, also without RAY_AUTH_MODE=token, which Ray's own client insists on."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return {}
    try:
        return dict(AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise _refused_token(address, error) from error


def _refused_token(address: str, error: Exception) -> UsageError:
    # Ray's first sentence says what is wrong, the others what to do about it in general.
    reason = re.split(r"\.+ ", _first_line(error))[0]
    return UsageError(f"{address} needs a valid token: {reason}; {TOKEN_WAY_OUT}")


def _num_nodes(cluster: Cluster, address: str) -> int:
    try:
        return cluster.num_nodes()
    except AuthenticationError as error:
        raise _refused_token(address, error) from error
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise PipelineError(
            f"{address} could not say how many nodes it has: {_first_line(error)}; try again"
        ) from error


def _submit(cluster: Cluster, job_id: str, command: str, env_vars: dict[str, str]) -> None:
    runtime_env: dict[str, Any] = {"working_dir": str(ROOT)}
    if env_vars:
        runtime_env["env_vars"] = env_vars
    try:
        cluster.submit_job(entrypoint=command, submission_id=job_id, runtime_env=runtime_env)
    except AuthenticationError as error:
        raise _refused_token("the cluster", error) from error
    except OSError as error:
        raise PipelineError(
            f"connection lost while submitting job {job_id}, which may run all the same: {_first_line(error)}"
        ) from error
    except (RuntimeError, ValueError) as error:
        if "already exists" in str(error):
            raise UsageError(
                f"submission_id must be new to the cluster, got {job_id!r}; choose another one or leave it out"
            ) from error
        raise PipelineError(f"the cluster refused job {job_id}: {_first_line(error)}") from error


def _refuse_large(package: Mapping[str, int]) -> None:
    size = sum(package.values())
    if size <= MAX_PACKAGE_BYTES:
        return
    folders: Counter[str] = Counter()
    for path, num_bytes in package.items():
        folders[path.partition("/")[0]] += num_bytes
    largest = ", ".join(f"{name} {num_bytes / 1e6:.1f} MB" for name, num_bytes in folders.most_common(3))
    raise UsageError(
        f"the package of {ROOT} must be at most {MAX_PACKAGE_BYTES / 1e6:.0f} MB, got {size / 1e6:.1f} MB (largest: "
        f"{largest}); move data out of the folder or name it in .rayignore"
    )


def _names_something(path: str, package: Mapping[str, int]) -> bool:
    """Says if a relative path means a file, a folder or, as a glob, any file of the package."""
    return any(name == path or name.startswith(f"{path}/") or fnmatch.fnmatchcase(name, path) for name in package)


def _environment(names: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    for name in names:
        if name not in environ:
            raise UsageError(f"env must name variables that are set here, got {name!r}; export it or leave it out")
        if re.search(r"\$[\w{]", environ[name]):
            # Ray expands such a value on the cluster, so that a password would arrive as another one.
            raise UsageError(
                f"env cannot pass {name}: its value has a '$' that Ray would expand; set it on the cluster's nodes"
            )
    return {name: environ[name] for name in names}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


if __name__ == "__main__":
    run_job(main)
