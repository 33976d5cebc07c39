"""Ranks that have joined have talked in every group already, and have no two groups for what one can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from pipeline.parallel.layout import Axis, RankGroups
from tests.distributed.ranks import Raised, Ranks


@dataclass
class Watch:
    """What this process did with its groups since the watch began."""

    made: list[tuple[int, ...]] = field(default_factory=list)
    reduced: list[Any] = field(default_factory=list)
    sent_to: list[tuple[Any, int]] = field(default_factory=list)
    patches: list[Any] = field(default_factory=list)


watch = Watch()


def begin_to_watch(groups: RankGroups) -> None:
    new_group, all_reduce, batch = dist.new_group, dist.all_reduce, dist.batch_isend_irecv

    def making(ranks: list[int], **given: Any) -> Any:
        watch.made.append(tuple(ranks))
        return new_group(ranks, **given)

    def reducing(x: Any, *given: Any, group: Any) -> Any:
        watch.reduced.append(group)
        return all_reduce(x, *given, group=group)

    def moving(moves: list[dist.P2POp]) -> Any:
        watch.sent_to.extend((move.group, move.peer) for move in moves if move.op is dist.isend)
        return batch(moves)

    for name, spy in (("new_group", making), ("all_reduce", reducing), ("batch_isend_irecv", moving)):
        watch.patches.append(mock.patch.object(dist, name, spy))
        watch.patches[-1].start()


def stop_watching(groups: RankGroups) -> dict[str, Any]:
    sequence, audio = groups.sequence, groups.audio
    seen = {
        "made": watch.made,
        "connected": all(axis.group in watch.reduced for axis in groups.axes if axis.size > 1),
        "reductions": len(watch.reduced),
        "to": {axis: _peers(getattr(groups, axis)) for axis in ("world", "tokens")} | {"ring": _peers(sequence.ring)},
        "apart": not {sequence.ring.group, sequence.ulysses.group, groups.tensor.group} - {None}
        & {audio.ring.group, audio.ulysses.group, groups.audio_tensor.group},
    }
    for patch in watch.patches:
        patch.stop()
    watch.__init__()  # type: ignore[misc] - the process is a rank again in the next test
    return seen


def _peers(axis: Axis) -> set[int]:
    return {peer for group, peer in watch.sent_to if group is axis.group}


def seen_while_joining(ranks: Ranks, layout: str) -> list[dict[str, Any]]:
    ranks.run(layout, begin_to_watch)
    answers = ranks.run(layout, stop_watching)
    assert not any(isinstance(answer, Raised) for answer in answers), answers
    return answers


@pytest.mark.parametrize("layout", ["ulysses4", "ring4", "tensor4", "guidance4"])
def test_axes_of_the_same_ranks_share_a_group_but_for_the_audio_lane(ranks: Ranks, layout: str) -> None:
    for seen in seen_while_joining(ranks, layout):
        assert seen["made"] == ([] if layout == "guidance4" else [(0, 1, 2, 3)]), "the world has one already"
        assert seen["apart"]


def test_axes_of_different_ranks_have_groups_of_their_own(ranks: Ranks) -> None:
    halves = [(0, 2), (1, 3)], [(0, 1), (2, 3)]
    for seen in seen_while_joining(ranks, "ring2_ulysses2"):
        assert sorted(seen["made"]) == sorted(2 * (halves[0] + halves[1])), "once for each lane"
    for seen in seen_while_joining(ranks, "guidance2_ulysses2"):
        assert sorted(seen["made"]) == sorted(halves[0] + 2 * halves[1]), "and tokens are those of ulysses"


@pytest.mark.parametrize("layout", ["ulysses2", "ring4", "ulysses2_tensor2", "ring2_ulysses2", "guidance2_tensor2"])
def test_every_group_is_connected_once_when_ranks_have_joined(ranks: Ranks, layout: str) -> None:
    for seen in seen_while_joining(ranks, layout):
        assert seen["connected"]
        assert seen["reductions"] <= 5, "one for the world, and one for each axis of each lane"


def test_neighbours_in_a_ring_and_in_a_picture_have_met_when_ranks_have_joined(ranks: Ranks) -> None:
    met = [seen["to"] for seen in seen_while_joining(ranks, "ring4")]
    assert [each["ring"] for each in met] == [{1}, {0, 2}, {1, 3}, {0, 2}]
    met = [seen["to"] for seen in seen_while_joining(ranks, "ulysses4")]
    assert [each["world"] for each in met] == [{1}, {0, 2}, {1, 3}, {2}]
    met = [seen["to"] for seen in seen_while_joining(ranks, "ring2_ulysses2")]
    assert [each["ring"] for each in met] == [{2}, {3}, {0}, {1}]
