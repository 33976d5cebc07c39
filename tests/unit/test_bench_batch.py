"""What a batch took, from what its run left."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from pipeline.bench.batch import batch_facts
from pipeline.records.outcome import NS_PER_S, LedgerEntry


def entry(gpu: str, state: str, t0_s: float, t1_s: float, row: str | None = None) -> LedgerEntry:
    return LedgerEntry("run", gpu, "node", gpu, 0, state, row, 1 if row else None, None, round(t0_s * NS_PER_S),
                       round(t1_s * NS_PER_S), "p", Decimal(str((t1_s - t0_s) / 1000)))  # fmt: skip


def result(id: str, **facts: Any) -> dict[str, Any]:
    return {"id": id, "status": "rendered", "error_message": None, "duration_s": 5.0, "parallel": "single", **facts}


def event(name: str, at_s: float) -> dict[str, Any]:
    return {"event": name, "at_ns": round(at_s * NS_PER_S)}


EVENTS = [event("worker_started", 1), event("attempt_started", 10), event("attempt_started", 11), event("rendered", 20),
          event("rendered", 22), event("finished", 30)]  # fmt: skip
LEDGER = [
    *(entry("0", "weight_load", 0, 10), entry("0", "denoise", 10, 20, "a"), entry("0", "idle", 20, 30)),
    *(entry("1", "weight_load", 0, 12), entry("1", "denoise", 12, 22, "b"), entry("1", "teardown", 22, 30)),
]


def test_rates_are_from_the_first_hand_out_to_the_last_commit() -> None:
    facts = batch_facts([result("a"), result("b", parallel="ulysses2")], LEDGER, EVENTS)
    assert facts["wall_s"] == 12 and facts["clips_a_minute"] == 10
    assert facts["video_s_per_s"] == pytest.approx(10 / 12)
    assert facts["layouts"] == {"single": 1, "ulysses2": 1} and facts["num_gpus"] == 2


def test_a_clip_costs_what_it_took_and_loaded_what_gpus_were_held() -> None:
    facts = batch_facts([result("a"), result("b")], LEDGER, EVENTS)
    assert facts["gpu_seconds_a_clip"] == 10 and facts["gpu_seconds_a_clip_loaded"] == 30
    assert facts["cost_usd_a_clip"] == pytest.approx(0.01)
    assert facts["cost_usd_a_clip_loaded"] == pytest.approx(0.03)


def test_idle_is_counted_while_clips_were_rendered_and_not_before_or_after() -> None:
    facts = batch_facts([result("a"), result("b")], LEDGER, EVENTS)
    assert facts["share_by_state"] == pytest.approx({"denoise": 20 / 24, "idle": 2 / 24, "weight_load": 2 / 24})
    assert facts["idle_share"] == pytest.approx(2 / 24)


def test_of_a_batch_without_a_clip_there_is_only_why() -> None:
    facts = batch_facts([result("a", status="failed", error_message="no room")], LEDGER, EVENTS[:3])
    assert facts == {"num_rendered": 0, "error_message": "no room"}
