"""What results and commit records say of a clip's layout."""

from __future__ import annotations

from dataclasses import replace

from pipeline.records.outcome import commit_record, item_row, recovered_row, rendered_row, skipped_row
from pipeline.records.parallel import ParallelLayout
from tests.unit.makers import FACTS, entry, item, rendered

PAIR = replace(item(), layout=ParallelLayout(ulysses=2), layout_reason="2 GPUs: tail, no other clip waits")
COLUMNS = {"parallel": "ulysses2", "parallel_reason": "2 GPUs: tail, no other clip waits", "num_gpus": 2}


def test_a_row_names_the_layout_of_its_clip_and_why_it_has_it() -> None:
    row = rendered_row(rendered(PAIR), FACTS)
    assert {name: row[name] for name in COLUMNS} == COLUMNS
    alone = item_row(item(), FACTS, status="not_started")
    assert (alone["parallel"], alone["parallel_reason"], alone["num_gpus"]) == ("single", "given", 1)


def test_a_commit_record_counts_all_gpus_of_the_group_by_its_leaders_time() -> None:
    entries = (entry("denoise", 0, 3, "row-0", 1), entry("decode", 3, 4, "row-0", 1))
    pair, alone = (commit_record(rendered(work), entries, FACTS) for work in (PAIR, item()))
    assert (alone["gpu_seconds"], alone["cost_usd"]) == (4.0, 4.0)
    assert (pair["gpu_seconds"], pair["cost_usd"]) == (8.0, 8.0)
    assert {name: pair[name] for name in COLUMNS} == COLUMNS


def test_a_clip_that_is_there_has_the_layout_it_was_made_on() -> None:
    """Whatever layout the attempt that finds it would have had."""
    record = commit_record(rendered(PAIR), (), FACTS)
    for row in (recovered_row(item(), record, FACTS), skipped_row(item(), record, FACTS)):
        assert {name: row[name] for name in COLUMNS} == COLUMNS
