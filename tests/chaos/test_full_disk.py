"""A disk that fills up in the middle of a night: the job ends with a reason, all is whole, and it goes on later."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import FarmSite, keep, plain_rows
from tests.end_to_end.checker import check_commits, check_output, records_of

NUM_ROWS = 150


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True,
                             text=True, check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"a disk of a megabyte takes a mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_the_job_whole_and_the_same_command_goes_on(
    farm_site: Callable[..., FarmSite], small_disk: Path
) -> None:
    site = farm_site("disk", plain_rows(NUM_ROWS))
    site.root = str(small_disk / "out")
    code, errors = site.run()
    assert code == 6 and "free" in errors and "Traceback" not in errors, errors
    committed = len(records_of(Path(site.root)))
    assert 0 < committed < NUM_ROWS
    for record in records_of(Path(site.root)):
        assert (Path(site.root) / "videos" / Path(record["uri"]).name).stat().st_size == record["size_bytes"]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert site.run()[0] == 0
    check_commits(Path(site.root))
    check_output(Path(site.root), site.ids)
    keep("full_disk", rows=NUM_ROWS, committed_before=committed, violations=0)
