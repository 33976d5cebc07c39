"""Layouts as values: sizes, names and what is refused."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError
from pipeline.records.parallel import ParallelLayout


@pytest.mark.parametrize(
    ("layout", "name", "num_gpus"),
    [
        (ParallelLayout(), "single", 1),
        (ParallelLayout(ulysses=4), "ulysses4", 4),
        (ParallelLayout(ring=2, ulysses=2), "ring2_ulysses2", 4),
        (ParallelLayout(guidance=3, ring=2, ulysses=4, tensor=2), "guidance3_ring2_ulysses4_tensor2", 48),
    ],
)
def test_layout_and_its_name_are_one_to_one(layout: ParallelLayout, name: str, num_gpus: int) -> None:
    assert layout.name == name
    assert layout.num_gpus == num_gpus
    assert ParallelLayout.named(name) == layout


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("ulysses2_ring2", "ring2_ulysses2"), ("ulysses1", "single"), ("ulysses02", "single"), ("", "single"),
     ("ulysses2_ulysses2", "ulysses2"), ("pipeline2", "single"), ("ulysses2_", "ulysses2")],
)  # fmt: skip
def test_second_spelling_of_a_layout_is_refused_with_the_first(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=rf"use {right} or"):
        ParallelLayout.named(wrong)


def test_degree_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"parallel\.ring must be 1 or more, got 0"):
        ParallelLayout(ring=0)


def test_layout_that_does_not_divide_the_heads_is_refused_with_the_degrees_that_do() -> None:
    with pytest.raises(UsageError, match=r"must divide the model's 8 heads, got 3; use one of \[1, 2, 4, 8\]"):
        ParallelLayout(ulysses=3).require_fits((32, 8), 8)


def test_tensor_and_ulysses_divide_the_same_heads() -> None:
    ParallelLayout(ulysses=4, tensor=2).require_fits((8,), 8)
    with pytest.raises(UsageError, match="must divide the model's 8 heads, got 16"):
        ParallelLayout(ulysses=4, tensor=4).require_fits((8,), 16)


def test_ring_and_guidance_leave_the_heads_whole() -> None:
    ParallelLayout(ring=3).require_fits((32,), 8)
    ParallelLayout(guidance=3).require_fits((32,), 8)


def test_layout_larger_than_a_node_is_refused() -> None:
    with pytest.raises(UsageError, match="got ring4_ulysses4 of 16 GPUs for nodes of 8"):
        ParallelLayout(ring=4, ulysses=4).require_fits((32,), 8)
