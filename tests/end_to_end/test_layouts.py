"""A clip does not depend on how many ranks made it beyond rounding: gangs of the real model on Ray, over gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from tests.end_to_end.checker import check_output, results_of, runs_of
from tests.end_to_end.conftest import Site, on_disk, run_command, small_rows

pytestmark = pytest.mark.ray

NUM_ROWS = 3
# Of 255: sums are taken in another order, and the encoder may turn a rounding into a step.
FRAME_TOLERANCE = 0.5


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.float32)


def rendered(site: Site, *arguments: str) -> Iterator[tuple[dict[str, object], np.ndarray]]:
    """Each row's result and frames."""
    done = run_command("render", *site.arguments, *arguments)
    assert done.returncode == 0, done.stderr
    output = Path(site.root)
    check_output(output, [f"clip-{i}" for i in range(NUM_ROWS)])
    for row in sorted(results_of(runs_of(output)[-1]), key=lambda row: row["id"]):
        yield row, frames_of(Path(row["uri"]))


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    site = on_disk(small_rows(NUM_ROWS), model_folder, tmp_path_factory.mktemp("alone"))
    return [frames for _, frames in rendered(site)]


@pytest.mark.parametrize("layout", ["ulysses2", "tensor2", pytest.param("ring2", marks=pytest.mark.long)])
def test_a_gang_renders_the_clips_of_one_rank(
    alone: list[np.ndarray], site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    arguments = (f"parallel={layout}", "cluster=local", "cluster.num_workers=1")
    for (row, frames), expected in zip(rendered(site("disk", NUM_ROWS), *arguments), alone, strict=True):
        assert (row["parallel"], row["num_gpus"]) == (layout, 2)
        assert np.abs(frames - expected).mean() < FRAME_TOLERANCE
