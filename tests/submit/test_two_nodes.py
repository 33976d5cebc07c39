"""A cluster of two nodes, both on this machine: workers on both, the same bytes, no output that only one would see."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.checker import check_output, download, records_of, runs_of
from tests.submit.conftest import ROOT, Head, InBucket, small_rows, write_manifest

pytestmark = pytest.mark.usefixtures("second_node")
ROWS = small_rows(6)
IDS = [row["id"] for row in ROWS]


@pytest.fixture(scope="module")
def second_node(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    log_path = tmp_path_factory.mktemp("node") / "node.log"
    arguments = ["start", f"--address={head.gcs_address}", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
    with log_path.open("w") as log:
        # Ray's head uses a token that it finds; a node that joins does so only when told.
        process = subprocess.Popen([str(Path(sys.executable).parent / "ray"), *arguments], stdout=log, stderr=log,
                                   env={**head.environ, "RAY_AUTH_MODE": "token"}, start_new_session=True)  # fmt: skip
    try:
        end = time.monotonic() + 40
        while head.request("GET", "/api/v0/nodes").count(b'"ALIVE"') < 2:
            assert process.poll() is None and time.monotonic() < end, log_path.read_text()
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait(20)


def test_a_plain_output_path_on_two_nodes_is_2_unless_it_is_shared(head: Head, tmp_path: Path) -> None:
    done = head.submit(tmp_path / "out", "dry_run=true", "wait=false")
    assert done.returncode == 2
    assert "on a cluster of 2 nodes" in done.stderr and "cluster.shared_output=true" in done.stderr
    done = head.submit(tmp_path / "out", "dry_run=true", "wait=false", "cluster.shared_output=true")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def expected(head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of the worker in the driver's own process, key -> sha256."""
    folder = tmp_path_factory.mktemp("in_process")
    manifest = write_manifest(folder / "m.parquet", ROWS)
    settings = [f"manifest={manifest}", f"output={folder / 'out'}", f"model.folder={head.model_folder}"]
    subprocess.run([sys.executable, "-m", "jobs.render", *settings], cwd=ROOT, env=head.environ, check=True,
                   capture_output=True, timeout=90)  # fmt: skip
    return _bytes_of(folder / "out")


def _bytes_of(output: Path) -> dict[str, str]:
    return {record["key"]: record["sha256"] for record in records_of(output)}


def _workers(head: Head) -> dict[str, str]:
    """Every worker that this cluster ever had, and its node."""
    actors = json.loads(head.request("GET", "/api/v0/actors?limit=1000"))["data"]["result"]["result"]
    return {actor["actor_id"]: actor["node_id"] for actor in actors if actor["class_name"] == "WorkerProcess"}


def test_the_cluster_of_ray_address_gives_workers_on_both_nodes(
    head: Head, expected: dict[str, str], tmp_path: Path
) -> None:
    manifest, before = write_manifest(tmp_path / "m.parquet", ROWS), _workers(head)
    settings = [f"manifest={manifest}", f"output={tmp_path / 'out'}", f"model.folder={head.model_folder}",
                "cluster=local", "cluster.num_workers=3", "cluster.shared_output=true"]  # fmt: skip
    environ = {**head.environ, "RAY_ADDRESS": head.gcs_address, "RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-m", "jobs.render", *settings], cwd=ROOT, env=environ, text=True,
                          capture_output=True, timeout=90, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_output(tmp_path / "out", IDS)
    assert _bytes_of(tmp_path / "out") == expected
    nodes = [node for worker, node in _workers(head).items() if worker not in before]
    assert len(nodes) == 3 and len(set(nodes)) == 2


def test_a_submitted_job_renders_on_the_node_that_has_room(
    head: Head, in_bucket: InBucket, expected: dict[str, str], tmp_path: Path
) -> None:
    manifest, before = in_bucket.manifest(ROWS), _workers(head)
    with head.taken():
        done = in_bucket.submit(manifest, "cluster=local", "cluster.num_workers=1")
    assert done.returncode == 0, done.stdout + done.stderr
    copy = download(in_bucket.bucket, tmp_path / "copy")
    check_output(copy, IDS)
    assert _bytes_of(copy) == expected
    (node,) = [node for worker, node in _workers(head).items() if worker not in before]
    nodes = json.loads(head.request("GET", "/api/v0/nodes"))["data"]["result"]["result"]
    assert [found["is_head_node"] for found in nodes if found["node_id"] == node] == [False]
    assert len(json.loads((runs_of(copy)[0] / "run.json").read_text())["workers"]) == 1
