"""Which workers are started and given back: by node, the wide ones first, and none that would lie in nobody's way."""

from __future__ import annotations

from pipeline.cluster.balance import Balance, Moves, Standing
from pipeline.records.parallel import ParallelLayout

ONE, TWO, FOUR = (ParallelLayout(ulysses=n) for n in (1, 2, 4))
SPLIT = ParallelLayout(tensor=2)


def standing(name: str, layout: ParallelLayout, node: str | None, state: str = "busy") -> Standing:
    return Standing(name, layout, node, is_idle=state != "busy", is_spare=state == "spare")


def singles(nodes: dict[str, str]) -> list[Standing]:
    """One of one GPU for each state, as in `{"a": "bbii"}`: two busy, two idle ones on node a."""
    state = {"b": "busy", "i": "idle", "s": "spare"}
    return [
        standing(f"{node}{i}", ONE, node, state[letter])
        for node, letters in nodes.items()
        for i, letter in enumerate(letters)
    ]


def test_missing_workers_are_started_the_widest_first_and_no_more_than_nodes_hold() -> None:
    moves = Balance([], {}, {"a": 4, "b": 4}, {ONE: 9, FOUR: 1}).moves()
    assert moves == Moves((FOUR, ONE, ONE, ONE, ONE))


def test_a_wide_worker_needs_one_node_however_many_gpus_are_free_on_two() -> None:
    held = [standing("a0", TWO, "a"), standing("b0", TWO, "b")]
    assert Balance(held, {}, {"a": 4, "b": 4}, {TWO: 2, FOUR: 1}).moves() == Moves()


def test_what_was_asked_for_takes_its_room_before_what_is_asked_for_next() -> None:
    held = [standing("w", FOUR, None, "idle")]
    assert Balance(held, {}, {"a": 4}, {FOUR: 1, ONE: 2}).moves() == Moves()
    assert Balance(held, {"a": 4}, {"a": 4, "b": 4}, {FOUR: 2}).moves() == Moves()


def test_idle_workers_beyond_the_wish_make_room_at_once_on_the_node_where_most_are() -> None:
    moves = Balance(singles({"a": "bbbi", "b": "biii"}), {}, {"a": 4, "b": 4}, {FOUR: 1, ONE: 4}).moves()
    assert moves == Moves((), ("b1", "b2", "b3"))
    moves = Balance(singles({"a": "bbbb", "b": "b"}), {"b": 3}, {"a": 4, "b": 4}, {FOUR: 1, ONE: 4}).moves()
    assert moves == Moves(), "the last one on node b is still at work, and node a is none the better for it"


def test_narrow_workers_yield_to_a_wide_one_even_if_they_are_wanted_but_not_to_another_layout_of_their_width() -> None:
    """Two idle ones of one GPU on each of two nodes leave no node whole; they find room elsewhere."""
    held = singles({"a": "ii", "b": "bb"})
    assert Balance(held, {}, {"a": 4, "b": 4}, {FOUR: 1, ONE: 4}).moves() == Moves((), ("a0", "a1"))
    going = singles({"b": "bb"})
    assert Balance(going, {"a": 2}, {"a": 4, "b": 4}, {FOUR: 1, ONE: 4}).moves() == Moves(), "nobody takes its place"
    assert Balance(going, {}, {"a": 4, "b": 4}, {FOUR: 1, ONE: 4}).moves() == Moves((FOUR, ONE, ONE))
    pair = [standing("p", TWO, "a", "idle")]
    assert Balance(pair, {}, {"a": 2}, {TWO: 1, SPLIT: 1}).moves() == Moves()
    assert Balance(pair, {}, {"a": 2}, {SPLIT: 1}).moves() == Moves((), ("p",))


def test_a_worker_beyond_the_wish_is_kept_until_it_is_spare_and_some_are_kept_to_race_stragglers() -> None:
    held = singles({"a": "bsis"})
    assert Balance(held, {}, {"a": 4}, {ONE: 1}).moves() == Moves((), ("a3", "a1"))
    assert Balance(held, {}, {"a": 4}, {ONE: 1}, num_spare=2).moves() == Moves((), ("a3",))
    waiting = [*singles({"a": "bs"}), standing("late", ONE, None, "spare")]
    assert Balance(waiting, {}, {"a": 2}, {ONE: 2}).moves() == Moves((), ("late",))


def test_with_a_bound_workers_are_asked_for_that_have_no_room_yet_and_one_is_asked_for_without() -> None:
    assert Balance([], {}, {"a": 2}, {ONE: 5}, max_gpus=3).moves() == Moves((ONE, ONE, ONE))
    assert Balance([], {}, {"a": 2}, {FOUR: 2}).moves() == Moves((FOUR,))
    assert Balance([], {"a": 2}, {"a": 0}, {ONE: 1}).moves() == Moves()
