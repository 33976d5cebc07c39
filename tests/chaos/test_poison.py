"""Rows that do harm: exceptions, segmentation faults, endless loops, no memory, killed by the kernel. Each is set aside
with its cause, all others are rendered, and the night loses no more time than the poison itself takes.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import CLIP, SEED, FarmSite, keep, plain_rows
from tests.end_to_end.checker import check_commits, check_partition, events_of, results_of, runs_of

NUM_WORKERS = 2
ON_RAY = ("cluster=local", f"cluster.num_workers={NUM_WORKERS}", "cluster.hang_after_s=2", "--step_s=0.01")
# What a poison row says, and the class its result bears.
KINDS = {
    "raise": "ZeroDivisionError",
    "segfault": "WorkerLost",
    "loop": "Hang",
    "memory": "MemoryError",
    "killed": "WorkerLost",
}
# Once beside another clip, which leaves doubt, then as often as the policy says; memory has three rungs.
MAX_ATTEMPTS = 3


def with_poison(rows: list[dict[str, Any]], num_poison: int, generator: random.Random) -> dict[str, str]:
    """Turn rows into poison; returns their kinds by id."""
    chosen = generator.sample(range(len(rows)), num_poison)
    kinds = {rows[index]["id"]: list(KINDS)[n % len(KINDS)] for n, index in enumerate(chosen)}
    for row in rows:
        row["prompt"] = f"{kinds[row['id']]} {row['prompt']}" if row["id"] in kinds else row["prompt"]
    return kinds


def poison_s(events: list[dict[str, Any]], kinds: Mapping[str, str]) -> float:
    """Worker-seconds that the poison itself took: its attempts, and the workers that had to start again for it."""
    begun: dict[tuple[str, int], int] = {}
    total_ns, lost_ns = 0, []
    for event in events:
        if event["event"] == "attempt_started":
            begun[event["id"], event["attempt"]] = event["at_ns"]
        elif event["event"] == "attempt_failed" and event["id"] in kinds:
            total_ns += event["at_ns"] - begun[event["id"], event["attempt"]]
        elif event["event"] == "worker_lost":
            lost_ns.append(event["at_ns"])
        elif event["event"] == "worker_ready" and lost_ns:
            total_ns += event["at_ns"] - lost_ns.pop(0)
    return total_ns / 1e9


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_rows", "num_poison"), [(80, 5), pytest.param(2000, 20, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_poison_is_set_aside_with_its_cause_and_takes_only_its_own_time(
    farm_site: Callable[..., FarmSite], tmp_path: Path, num_rows: int, num_poison: int
) -> None:
    rows = plain_rows(num_rows)
    clean = FarmSite(str(tmp_path / "clean"), farm_site("disk", rows).manifest, [])
    started_s = time.monotonic()
    code, errors = clean.run(*ON_RAY, timeout_s=900)
    clean_s = time.monotonic() - started_s
    assert code == 0, errors

    kinds = with_poison(rows, num_poison, random.Random(SEED))
    site = farm_site("disk", rows)
    started_s = time.monotonic()
    code, errors = site.run(*ON_RAY, timeout_s=900)
    with_poison_s = time.monotonic() - started_s
    assert code == 3, errors
    (run,) = runs_of(Path(site.root))
    results = {row["id"]: row for row in results_of(run)}
    assert {id for id, row in results.items() if row["status"] != "rendered"} == set(kinds)
    for id, kind in kinds.items():
        row = results[id]
        assert (row["status"], row["error_class"]) == ("failed", KINDS[kind]), row
        assert row["error_message"] and row["attempts"] <= MAX_ATTEMPTS, row
    check_commits(Path(site.root))
    check_partition(run)
    own_s = poison_s(events_of(run), kinds) / NUM_WORKERS
    # The short form is too short to say more than that nothing stands still.
    assert with_poison_s - own_s <= (1.1 if num_rows >= 2000 else 2.0) * clean_s
    keep(
        "poison", rows=num_rows, poison=dict(Counter(kinds.values())), violations=0, clean_s=round(clean_s, 1),
        with_poison_s=round(with_poison_s, 1), the_poisons_own_s=round(own_s, 1),
        rest_over_clean=round((with_poison_s - own_s) / clean_s, 3),
    )  # fmt: skip


def test_a_clip_that_fits_on_a_lower_rung_only_is_rendered_there(farm_site: Callable[..., FarmSite]) -> None:
    rows = [{"id": "tight", "prompt": "tight offload", **CLIP}, *plain_rows(2)]
    site = farm_site("disk", rows)
    assert site.run()[0] == 0
    rungs = {row["id"]: row["memory_rung"] for row in results_of(runs_of(Path(site.root))[0])}
    assert rungs == {"tight": "offload", "clip-0": "planned", "clip-1": "planned"}
