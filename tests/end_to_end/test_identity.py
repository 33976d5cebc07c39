"""The bytes of a clip depend on its row, the model and the recipe, and on nothing else: not on who renders it where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.checker import check_output, results_of, runs_of
from tests.end_to_end.conftest import Site, on_disk, run_command, small_rows

pytestmark = pytest.mark.ray

NUM_ROWS = 4
WAYS = {
    "in_process": (),
    "ray_1": ("cluster=local", "cluster.num_workers=1"),
    "ray_2": ("cluster=local", "cluster.num_workers=2"),
}


def hashes(site: Site, way: str, tmp_path: Path) -> dict[str, str]:
    """Row id -> sha256 of what a whole run gives."""
    done = run_command("render", *site.arguments, *WAYS[way])
    assert done.returncode == 0, done.stderr
    output = site.output(tmp_path / "copy")
    check_output(output, [f"clip-{i}" for i in range(NUM_ROWS)])
    return {row["id"]: row["sha256"] for row in results_of(runs_of(output)[-1])}


@pytest.fixture(scope="module")
def reference(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reference")
    return hashes(on_disk(small_rows(NUM_ROWS), model_folder, folder), "in_process", folder)


@pytest.mark.parametrize(
    ("way", "on"), [(way, on) for way in WAYS for on in ("disk", "bucket") if (way, on) != ("in_process", "disk")]
)
def test_every_way_gives_the_bytes_of_one_process_on_a_disk(
    reference: dict[str, str], site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str,
    on: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert hashes(site(on, NUM_ROWS), way, tmp_path) == reference
    assert len(set(reference.values())) == NUM_ROWS
