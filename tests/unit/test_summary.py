"""Counting a run: every row is counted once, money sums exactly, and what is shown keeps its digits."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from pipeline.report.summary import PURPOSES, as_text, show_usd, summarise

Row = dict[str, Any]
RUN: Row = {
    "run_id": "r1",
    "state": "finished",
    "exit_code": 3,
    "started_at": "2026-11-20T08:00:00+00:00",
    "finished_at": "2026-11-20T08:02:00+00:00",
}


def result(id_: str, status: str = "rendered", **facts: Any) -> Row:
    row: Row = {"id": id_, "status": status, "error_class": None, "error_message": None, "tags": {}, "attempts": 1}
    if status in ("rendered", "skipped"):
        row |= {"width": 1000, "height": 500, "num_frames": 24, "duration_s": 1.0, "denoise_s": 4.0, "cost_usd": 0.1}
    return row | facts


def entry(state: str, seconds: float, id_: str | None = None, attempt: int | None = None, usd: str = "0.1") -> Row:
    return {
        "gpu_id": "g0",
        "state": state,
        "id": id_,
        "attempt": attempt,
        "t0_ns": 0,
        "t1_ns": round(seconds * 1e9),
        "gpu_seconds": seconds,
        "energy_j": None,
        "cost_usd": Decimal(usd),
    }


def cost_by_purpose(results: list[Row], ledger: list[Row]) -> dict[str, Decimal]:
    return {spend.name: spend.cost_usd for spend in summarise(results, ledger, RUN).costs.by_purpose}


def test_every_row_is_counted_under_its_status() -> None:
    rows = [result("a"), result("b"), result("c", "skipped"), result("d", "failed"), result("e", "not_started")]
    assert summarise(rows, [], RUN).status_counts == {
        "rendered": 2,
        "skipped": 1,
        "rejected": 0,
        "failed": 1,
        "not_started": 1,
    }


def test_errors_are_grouped_by_class_and_message_with_their_ids() -> None:
    rows = [
        result("a", "failed", error_class="EngineFault", error_message="NaN"),
        result("b", "rejected", error_class="InvalidRequest", error_message="bad size"),
        result("c", "rejected", error_class="InvalidRequest", error_message="bad size"),
        result("d", "rejected", error_class="InvalidRequest", error_message="no prompt"),
    ]
    first, second = summarise(rows, [], RUN).errors
    assert (first.error_class, first.count) == ("InvalidRequest", 3)
    assert [(message.text, message.ids) for message in first.messages] == [
        ("bad size", ("b", "c")),
        ("no prompt", ("d",)),
    ]
    assert (second.error_class, second.messages[0].text, second.messages[0].ids) == ("EngineFault", "NaN", ("a",))


def test_throughput_counts_rendered_clips_only() -> None:
    rows = [result("a", duration_s=2.0), result("b", duration_s=4.0), result("c", "skipped", duration_s=100.0)]
    summary = summarise(rows, [entry("denoise", 10.0, "a", 1), entry("denoise", 20.0, "b", 1)], RUN)
    assert summary.elapsed_s == 120.0
    assert summary.clips_per_minute == pytest.approx(1.0)
    assert summary.video_s_per_worker_s == pytest.approx(0.2)


def test_running_run_is_timed_by_its_ledger() -> None:
    running = RUN | {"state": "running", "exit_code": None, "finished_at": None}
    summary = summarise([], [entry("denoise", 30.0, "a", 1)], running)
    assert summary.elapsed_s == 30.0
    assert summary.exit_meaning == ""


def test_run_without_rows_and_ledger_can_be_summarised() -> None:
    summary = summarise([], [], RUN | {"finished_at": None})
    assert summary.elapsed_s is None and summary.clips_per_minute is None
    assert summary.costs.total.cost_usd == 0 and summary.costs.total_per_clip_usd is None
    assert as_text(summary).startswith("run r1: finished")


def test_stage_percentiles_interpolate_and_leave_out_missing_values() -> None:
    rows = [result(str(s), denoise_s=float(s), decode_s=None) for s in (5, 1, 3, 2, 4)]
    (denoise,) = summarise(rows, [], RUN).stages
    assert (denoise.name, denoise.num_clips, denoise.total_s, denoise.max_s) == ("denoise", 5, 15.0, 5.0)
    assert denoise.p50_s == 3.0
    assert denoise.p90_s == pytest.approx(4.6)


def test_money_sums_exactly_whatever_the_number_of_rows() -> None:
    ledger = [entry("denoise", 0.001, "a", 1, usd="0.00000000000001") for _ in range(10_000)]
    ledger.append(entry("idle", 1.0, usd="12345.6"))
    costs = summarise([result("a")], ledger, RUN).costs
    assert costs.total.cost_usd == Decimal("12345.6000000001")
    assert sum(s.cost_usd for s in costs.by_state) == sum(s.cost_usd for s in costs.by_purpose) == costs.total.cost_usd


def test_every_state_is_paid_for_one_purpose() -> None:
    ledger = [
        entry("provisioning", 1.0, usd="1"),
        entry("weight_load", 1.0, usd="2"),
        entry("warm_up", 1.0, usd="4"),
        entry("denoise", 1.0, "a", 1, usd="8"),
        entry("wait", 1.0, "a", 1, usd="16"),
        entry("wait", 1.0, usd="32"),
        entry("idle", 1.0, usd="64"),
        entry("teardown", 1.0, usd="128"),
        entry("unknown", 1.0, usd="256"),
    ]
    purposes = cost_by_purpose([result("a")], ledger)
    assert purposes == {"cold start": 7, "direct": 24, "idle": 224, "unknown": 256}
    assert list(purposes) == [name for name in PURPOSES if name in purposes]


def test_attempts_that_gave_no_clip_are_waste_with_all_their_time() -> None:
    ledger = [
        entry("denoise", 5.0, "retried", 1, usd="1"),
        entry("failed", 1.0, "retried", 1, usd="2"),
        entry("denoise", 5.0, "lost", 1, usd="4"),  # its worker died: no failed entry, only a later attempt
        entry("denoise", 5.0, "lost", 2, usd="8"),
        entry("denoise", 5.0, "retried", 2, usd="16"),
        entry("denoise", 5.0, "given up", 1, usd="32"),
    ]
    rows = [result("retried", attempts=2), result("lost", attempts=2), result("given up", "failed")]
    assert cost_by_purpose(rows, ledger) == {"direct": 24, "waste": 39}


def test_of_two_attempts_in_a_race_the_one_that_lost_is_waste_whichever_came_first() -> None:
    ledger = [entry("denoise", 5.0, "raced", 1, usd="1"), entry("denoise", 5.0, "raced", 2, usd="2")]
    assert cost_by_purpose([result("raced", attempts=1)], ledger) == {"direct": 1, "waste": 2}
    assert cost_by_purpose([result("raced", attempts=2)], ledger) == {"direct": 2, "waste": 1}


def test_a_clip_that_another_run_committed_first_is_waste_of_this_one() -> None:
    ledger = [entry("denoise", 5.0, "adopted", 1, usd="1")]
    assert cost_by_purpose([result("adopted", rendered_by_run="another")], ledger) == {"waste": 1}


def test_unit_costs_are_of_rendered_clips_direct_and_in_all() -> None:
    ledger = [
        entry("denoise", 1.0, "a", 1, usd="3"),
        entry("denoise", 1.0, "b", 1, usd="3"),
        entry("idle", 1.0, usd="6"),
    ]
    rows = [result("a", duration_s=1.0), result("b", duration_s=3.0), result("c", "skipped")]
    costs = summarise(rows, ledger, RUN).costs
    assert (costs.direct_per_clip_usd, costs.total_per_clip_usd) == (3, 6)
    assert (costs.direct_per_video_s_usd, costs.total_per_video_s_usd) == (Decimal("1.5"), 3)
    assert (costs.direct_per_megapixel_frame_usd, costs.total_per_megapixel_frame_usd) == (
        Decimal("0.25"),
        Decimal("0.5"),
    )


def test_tags_are_read_as_parquet_maps_and_as_dicts() -> None:
    rows = [result("a", tags={"team": "film"}), result("b", tags=[("team", "film"), ("take", "2")])]
    ledger = [entry("denoise", 1.0, "a", 1, usd="1"), entry("denoise", 1.0, "b", 1, usd="2"), entry("idle", 9.0)]
    by_tag = {spend.name: spend.cost_usd for spend in summarise(rows, ledger, RUN).costs.by_tag}
    assert by_tag == {"team=film": 3, "take=2": 2}


def test_estimates_are_compared_where_both_figures_exist() -> None:
    rows = [
        result("a", estimated_gpu_seconds=10.0, gpu_seconds=12.0, estimated_cost_usd=0.1),
        result("b", estimated_gpu_seconds=10.0, gpu_seconds=5.0, estimated_cost_usd=0.1),
        result("c", estimated_gpu_seconds=10.0, gpu_seconds=10.0, estimated_cost_usd=0.1),
        result("d", gpu_seconds=99.0),
    ]
    check = summarise(rows, [], RUN).estimate
    assert check is not None
    assert (check.num_clips, check.estimated_gpu_seconds, check.actual_gpu_seconds) == (3, 30.0, 27.0)
    assert (check.median_ratio, check.worst_ratio) == (1.0, 0.5)
    assert check.estimated_cost_usd == Decimal("0.3")
    assert summarise([result("d", gpu_seconds=99.0)], [], RUN).estimate is None


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        ("0", "$0"),
        ("0.0001234567", "$0.000123"),
        ("0.1", "$0.100"),
        ("0.99951", "$1.00"),
        ("1234.5", "$1,234.50"),
        ("-0.05", "-$0.0500"),
    ],
)
def test_money_is_shown_with_sensible_digits(amount: str, shown: str) -> None:
    assert show_usd(Decimal(amount)) == shown


def test_text_names_exit_code_errors_and_total() -> None:
    rows = [result("a"), *(result(f"x{i}", "failed", error_class="EngineFault", error_message="NaN") for i in range(7))]
    text = as_text(summarise(rows, [entry("denoise", 2.0, "a", 1, usd="0.000123")], RUN))
    assert "exit code 3: finished, with rows rejected or failed" in text
    assert "1 rendered, 7 failed" in text
    assert "EngineFault: 7" in text and "NaN [x0, x1, x2, x3, x4 and 2 more]" in text
    assert "$0.000123" in text
    assert all(len(line) <= 100 for line in text.splitlines())
