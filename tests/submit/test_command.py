"""What `jobs.submit` refuses before anything is sent, what it sends, and the package that Ray makes of this folder."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.submit.conftest import ROOT

pytest.importorskip("ray", reason="ray is not installed")

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging

from jobs import submit
from pipeline.errors import UsageError


def _submit(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "jobs.submit", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60,
        env={**clean, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environ}, check=False,
    )  # fmt: skip


HERE = "address=http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "address must be given"),
        (("address=auto", "output=/o"), "address must be the URL of a Ray dashboard, got 'auto'"),
        ((HERE, "output=/o", "outptu=/x"), "'outptu' is not a setting of jobs.render; did you mean output?"),
        ((HERE, "output=/o", "submision_id=x"), "did you mean submission_id?"),
        ((HERE, "output=/o", "submission_id=a/b"), "submission_id must be letters"),
        ((HERE, "output=/o", "limit=-1"), "limit must be 0 or more"),
        ((HERE, "output=/o", "wait=maybe"), "wait"),
        ((HERE, "output=/o", "env=[NOT_SET_HERE]"), "env must name variables that are set here, got 'NOT_SET_HERE'"),
        ((HERE, "output=/o", "env=[WITH_DOLLAR]"), "env cannot pass WITH_DOLLAR: its value has a '$'"),
        ((HERE,), "output must be a URL or an absolute path in a submitted Ray job, got 'outputs/demo'"),
        ((HERE, "output=/o", "manifest=tests/x.parquet"), "got 'tests/x.parquet', which is not in it"),
        ((HERE, "output=/o"), "address must be the dashboard of a running Ray cluster, got 'http://127.0.0.1:1'"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments: tuple[str, ...], says: str) -> None:
    done = _submit(*arguments, WITH_DOLLAR="pa$word")
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert "pa$word" not in done.stderr


class _NotRay(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"hello": "world"}')

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def _other_server() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _NotRay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_another_server_and_one_that_never_answers_are_2_in_time() -> None:
    with _other_server() as port:
        done = _submit(f"address=http://127.0.0.1:{port}", "output=/o")
    assert done.returncode == 2 and "got 'http://127.0.0.1:" in done.stderr
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        done = _submit(f"address=http://127.0.0.1:{silent.getsockname()[1]}", "output=/o")
    assert done.returncode == 2 and "timed out" in done.stderr
    assert time.monotonic() - begin < 12


def test_help_shows_both_sets_of_settings() -> None:
    done = _submit("--help")
    assert done.returncode == 0
    assert "submission_id=" in done.stdout and "cluster.shared_output=False" in done.stdout


def test_the_entrypoint_carries_every_argument_exactly() -> None:
    given = ["manifest=/d/a 'b' $HOME/x=1.parquet", "ids=[a,b c]", "output=s3://b/`o`;rm", 'model.folder="x\\y"']
    assert shlex.split(submit.entrypoint(given)) == ["python", "-m", "jobs.render", *given]


def test_the_package_is_small_and_holds_what_a_render_needs(tmp_path: Path) -> None:
    excludes = get_runtime_env_default_excludes()
    target = tmp_path / "package.zip"
    packaging.create_package(str(ROOT), target, include_gitignore=True, excludes=excludes)
    assert target.stat().st_size <= 20_000_000
    names = set(zipfile.ZipFile(target).namelist())
    top = {name.partition("/")[0] for name in names}
    assert {"jobs", "pipeline", "kernels", "conf"} <= top
    assert not top & {"tests", ".venv", ".models", ".carry", "outputs", ".git", ".ci"}
    assert not [name for name in names if "__pycache__" in name]
    assert "conf/demo/prompts.parquet" in names
    assert set(submit.package_files(ROOT)) == {name for name in names if not name.endswith("/")}


def test_what_is_left_out_stays_so_without_gitignore_and_is_not_walked(tmp_path: Path) -> None:
    for name in (
        "tests/a.py",
        ".models/m",
        "outputs/o",
        ".venv/v",
        ".carry/c",
        ".git/g",
        "jobs/j.py",
        "x/__pycache__/p",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    seen: list[Path] = []
    packaging._dir_travel(tmp_path, [], seen.append, include_gitignore=False, logger=logging.getLogger("quiet"))
    assert {path.relative_to(tmp_path).as_posix() for path in seen} == {".", ".rayignore", "jobs", "jobs/j.py", "x"}


def test_a_large_package_is_refused_with_its_largest_folders() -> None:
    package = {"data/a.bin": 15_000_000, "data/b.bin": 9_000_000, "jobs/x.py": 1_000, "big.bin": 2_000_000}
    with pytest.raises(UsageError, match=r"at most 20 MB, got 26.0 MB \(largest: data 24.0 MB, big.bin 2.0 MB, jobs"):
        submit._refuse_large(package)
    submit._refuse_large({"jobs/x.py": 20_000_000})


def test_relative_manifests_are_looked_for_in_the_package() -> None:
    package = {"data/a.parquet": 1, "data/b.parquet": 1}
    for path in ("data", "data/a.parquet", "data/*.parquet"):
        assert submit._names_something(path, package)
    for path in ("dat", "data/c.parquet", "../data", "other/*.parquet"):
        assert not submit._names_something(path, package)
