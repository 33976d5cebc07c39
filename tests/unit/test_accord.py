"""Ranks of a gang start an item together or not at all, and give it up together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipeline.accord import CANCELLED, FAILED, Accord, Consent
from pipeline.errors import Cancelled, EngineFault

NUM_STEPS = 3


def meeting(num_ranks: int) -> list[Consent]:
    """A consent for each rank, over threads. A vote that not all ranks take part in breaks the barrier."""
    votes = [0] * num_ranks
    barrier = threading.Barrier(num_ranks, timeout=5)

    def consent_of(rank: int) -> Consent:
        def consent(vote: int) -> int:
            votes[rank] = vote
            barrier.wait()
            lowest = min(votes)
            barrier.wait()
            return lowest

        return consent

    return [consent_of(rank) for rank in range(num_ranks)]


def on_ranks(bodies: list[Callable[[Consent], None]]) -> list[str]:
    """What each rank ended with: the name of its error, or "done"."""
    ends = [""] * len(bodies)

    def run(rank: int, consent: Consent) -> None:
        try:
            bodies[rank](consent)
            ends[rank] = "done"
        except Exception as error:  # noqa: BLE001 - looked at below
            ends[rank] = type(error).__name__

    threads = [threading.Thread(target=run, args=(rank, consent)) for rank, consent in enumerate(meeting(len(bodies)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def rendering(*, cancelled_at: int | None = None, in_stage: bool = False) -> Callable[[Consent], None]:
    def beat(stage: str, step: int, num_steps: int) -> None:
        if step == cancelled_at and not in_stage:
            raise Cancelled("the driver asked")

    def enter(stage: str) -> None:
        if in_stage and cancelled_at is not None:
            raise Cancelled("the driver asked")

    def run(consent: Consent) -> None:
        accord = Accord(consent, enter, beat)
        accord.start()
        accord.stage("denoise")
        for step in range(1, NUM_STEPS + 1):
            accord.step("denoise", step, NUM_STEPS)
        accord.refuse(FAILED)

    return run


def refusing(vote: int) -> Callable[[Consent], None]:
    return lambda consent: Accord(consent, lambda stage: None, lambda *of: None).refuse(vote)


def test_ranks_that_all_go_on_come_to_the_end() -> None:
    assert on_ranks([rendering(), rendering(), rendering()]) == ["done"] * 3


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_cancellation_that_one_rank_hears_first_ends_the_item_on_all_at_the_same_step(step: int) -> None:
    assert on_ranks([rendering(), rendering(cancelled_at=step)]) == ["Cancelled"] * 2


def test_a_cancellation_between_stages_ends_it_on_all() -> None:
    assert on_ranks([rendering(cancelled_at=1, in_stage=True), rendering(), rendering()]) == ["Cancelled"] * 3


@pytest.mark.parametrize(("vote", "error"), [(CANCELLED, Cancelled), (FAILED, EngineFault)])
def test_a_rank_that_refuses_keeps_nobody_waiting(vote: int, error: type[Exception]) -> None:
    assert on_ranks([rendering(), refusing(vote)]) == [error.__name__, "done"]


def test_a_rank_that_leaves_between_chunks_ends_the_item_on_all_where_they_vote_next() -> None:
    def leaving(consent: Consent) -> None:
        accord = Accord(consent, lambda stage: None, lambda *of: None)
        accord.start()
        accord.leave()

    assert on_ranks([leaving, rendering(), rendering()]) == ["done", "Cancelled", "Cancelled"]
