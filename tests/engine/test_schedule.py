"""Noise levels by schedule: the reference's numbers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pipeline.config.schedule import ScheduleConfig
from pipeline.errors import UsageError

PLAIN = {"terminal": 0.0, "num_tokens": 0}
UNIFORM = {"base_shift": 0.0, "max_shift": 0.0, **PLAIN}
LTX2 = {"num_tokens": 0}
# Recorded case -> steps, tokens, settings. LTX-Video's lists have no final 0.
CASES = {
    "beta.steps8": (8, 4096, {"name": "beta", **PLAIN}),
    "linear_quadratic.steps1": (1, 4096, {"name": "linear_quadratic", **PLAIN}),
    "linear_quadratic.steps2": (2, 4096, {"name": "linear_quadratic", **PLAIN}),
    "linear_quadratic.steps5": (5, 4096, {"name": "linear_quadratic", **PLAIN}),
    "linear_quadratic.steps8": (8, 4096, {"name": "linear_quadratic", **PLAIN}),
    "linear_quadratic.steps20": (20, 4096, {"name": "linear_quadratic", **PLAIN}),
    "ltx2.steps4.tokens1024": (4, 1024, LTX2),
    "ltx2.steps8.tokens1536": (8, 1536, LTX2),
    "ltx2.steps20.tokens4096": (20, 4096, LTX2),
    "ltx2.steps30.tokens6000": (30, 6000, LTX2),
    "ltx2.steps40.tokensdefault": (40, 12, {}),
    "ltx2_nostretch.steps8.tokens1536": (8, 1536, PLAIN),
    "ltx2_shift1.1_0.5_terminal0.2.steps8.tokens1536": (
        8, 1536, {"base_shift": 0.5, "max_shift": 1.1, "terminal": 0.2, "num_tokens": 0},
    ),
    "ltxv.uniform.steps4.tokens1024": (4, 1024, UNIFORM),
    "ltxv.constant_shift2.steps4.tokens1024": (4, 1024, {"base_shift": 2.0, "max_shift": 2.0, **PLAIN}),
    "ltxv.linear_quadratic.steps4.tokens1024": (4, 1024, {"name": "linear_quadratic", **PLAIN}),
    **{
        f"ltxv.{kind}.steps{steps}.tokens{tokens}": (steps, tokens, settings)
        for kind, settings in {
            "sd3": PLAIN, "sd3_terminal0.1": LTX2, "simple_diffusion": {"name": "simple_diffusion", **PLAIN}
        }.items()
        for steps, tokens in ((4, 1024), (8, 1536), (20, 4096), (30, 6000))
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(fixtures: Path) -> dict:
    return load_file(fixtures / "schedulers" / "case_sigmas.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_levels_are_the_references(recorded, case):
    num_steps, num_tokens, settings = CASES[case]
    levels = ScheduleConfig(num_steps=num_steps, **settings).levels(num_tokens)
    if case.startswith("ltxv"):
        assert levels.pop() == 0
    assert levels == pytest.approx(recorded[f"out.{case}"].tolist(), abs=1e-6)


def test_every_recorded_schedule_is_among_the_cases(recorded):
    assert {f"out.{case}" for case in CASES} == {name for name in recorded if "distilled" not in name}


def test_trap_17_ltx2_schedules_are_for_4096_tokens_whatever_the_size():
    assert ScheduleConfig(num_steps=8).levels(12) == ScheduleConfig(num_steps=8, num_tokens=0).levels(4096)
    assert ScheduleConfig(num_steps=8).levels(12) != ScheduleConfig(num_steps=8, num_tokens=0).levels(12)


def test_trap_28_what_is_skipped_at_the_end_is_stepped_over_to_0():
    levels = ScheduleConfig(num_steps=30, num_tokens=0).levels(6000)
    kept = ScheduleConfig(num_steps=30, num_tokens=0, skip_first=2, skip_last=3).levels(6000)
    assert kept == [*levels[2:27], 0.0]


@pytest.mark.parametrize("num_tokens", [100_000, 1_000_000, 10_000_000])
def test_levels_of_very_many_tokens_still_fall(num_tokens):
    """Near 1 float64 tells no two levels apart from 100,000 tokens on: a long clip at a large size would not move."""
    levels = ScheduleConfig(num_steps=8, num_tokens=0).levels(num_tokens)
    assert levels[-2:] == [pytest.approx(0.1), 0.0]
    # The shift is so large that signals are to each other as t / (1 - t).
    odds = [i / (8 - i) for i in range(8)]
    assert levels[:-1] == pytest.approx([1 - 0.9 * odd / odds[-1] for odd in odds], abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "karras"}, "name must be one of shifted, simple_diffusion, linear_quadratic, beta, got 'karras'"),
        ({"num_steps": 0}, "num_steps must be 1 or more, got 0"),
        ({"terminal": 1.0}, "terminal must be from 0 to below 1"),
        ({"max_shift": float("nan")}, "max_shift must be a finite number"),
        ({"num_steps": 20, "skip_first": 17, "skip_last": 3}, "fewer than num_steps, got 20; raise num_steps above 20"),
    ],
)
def test_a_wrong_schedule_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ScheduleConfig(**settings)
