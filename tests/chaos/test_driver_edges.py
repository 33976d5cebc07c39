"""kill -9 of a driver before and after every change it makes to its store, one edge after the other, on one output.

The long form kills 200 times, each edge at least three times on a disk and three times in a bucket.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.conftest import SEED, FarmSite, keep, plain_rows
from tests.end_to_end.checker import check_output

# What a driver commits before it is killed, or ends: all edges of a run, its start and its end among them.
LIMIT = 3


def edges_of(site: FarmSite, listing: Path) -> Counter[str]:
    """How often a run that is not killed passes each edge."""
    assert site.run(f"limit={LIMIT}", f"--edges={listing}")[0] == 0
    return Counter(listing.read_text().splitlines())


def is_killed(site: FarmSite, which: int, edge: str) -> bool:
    """Run a driver that is killed at an edge; False if it never came there."""
    code, errors = site.run(f"limit={LIMIT}", f"--kill_at={which} {edge}")
    assert code in (-signal.SIGKILL, 0), errors
    return code == -signal.SIGKILL


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("on", ["disk", "bucket"])
@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.long)], ids=["short", "long"])
def test_a_driver_killed_at_any_edge_loses_repeats_and_leaves_nothing(
    farm_site: Callable[..., FarmSite], tmp_path: Path, on: str, num_kills: int
) -> None:
    generator = random.Random(f"{SEED} {on}")
    # Some to spare, for edges that are tried twice.
    site = farm_site(on, plain_rows(LIMIT * (num_kills + 10)))
    passed = edges_of(site, tmp_path / "edges.txt")
    assert len(passed) >= 24, passed
    plan = [edge for _ in range(num_kills // len(passed) + 1) for edge in generator.sample(sorted(passed), len(passed))]
    killed: Counter[str] = Counter()
    started_s = time.monotonic()
    for edge in plan[:num_kills]:
        # Later ones of many may not come, when the driver writes less often.
        which = generator.randint(1, min(passed[edge], LIMIT if "<" in edge else 1))
        killed[edge] += is_killed(site, which, edge) or (which > 1 and is_killed(site, 1, edge))
    assert killed.total() >= 0.9 * num_kills, killed
    assert all(killed[edge] >= num_kills // len(passed) for edge in passed), killed
    assert site.run()[0] == 0
    check_output(site.output(tmp_path / "copy"), site.ids)
    keep("driver_edges", on=on, kills=killed.total(), edges=len(killed), rows=len(site.ids), violations=0,
         seconds=round(time.monotonic() - started_s, 1))  # fmt: skip
