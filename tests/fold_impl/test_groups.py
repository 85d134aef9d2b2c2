"""Which communicator every axis of every rank runs on, without a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fold_impl.groups import AXES, FoldGroups, build_groups
from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from tests.worlds import alone

FOLDED = FoldLayout(8, tp_size=2, ep_size=2, etp_size=2)
"""SPEC section 1, last line: tp 01 23 45 67, dp 0246 1357, ep 02 13 46 57, edp 04 15 26 37."""


def recorded(layout: FoldLayout, rank: int, points: Points | None = None) -> Any:
    """Build a rank's groups with communicators that are their own rank tuples."""
    asked: list[tuple[int, ...]] = []

    def new_group(ranks: Sequence[int]) -> tuple[int, ...]:
        asked.append(tuple(ranks))
        return tuple(ranks)

    return build_groups(layout, rank, new_group, points), asked


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, {"tp": (0, 1), "dp": (0, 2, 4, 6), "ep": (0, 2), "etp": (0, 1), "edp": (0, 4)}),
        (5, {"tp": (4, 5), "dp": (1, 3, 5, 7), "ep": (5, 7), "etp": (4, 5), "edp": (1, 5)}),
        (6, {"tp": (6, 7), "dp": (0, 2, 4, 6), "ep": (4, 6), "etp": (6, 7), "edp": (2, 6)}),
    ],
)
def test_a_rank_sits_in_the_groups_of_the_published_table(
    rank: int, expected: dict[str, tuple[int, ...]]
) -> None:
    """Members, own position and communicator of ranks 0, 5 and 6 of world 8, tp ep etp 2."""
    groups: FoldGroups = recorded(FOLDED, rank)[0]
    for axis, ranks in {**expected, "stage": tuple(range(8))}.items():
        group = getattr(groups, axis)
        assert (group.ranks, group.index, group.handle) == (ranks, ranks.index(rank), ranks)
        assert group.size == len(ranks)


def test_every_rank_asks_for_the_same_communicators_in_the_same_order() -> None:
    """A rank that asked in another order would hang all others."""
    asked = [recorded(FOLDED, rank)[1] for rank in range(8)]
    assert all(other == asked[0] for other in asked[1:])
    assert len(asked[0]) == 4 + 2 + 4 + 4 + 1  # tp (etp is the same), dp, ep, edp, stage


def test_axes_with_the_same_ranks_share_one_communicator() -> None:
    """At world 4, tp 4, ep 4 the TP group, the EP group and the stage are one."""
    groups, asked = recorded(FoldLayout(4, tp_size=4, ep_size=4), 2)
    assert asked == [(0, 1, 2, 3)]
    assert groups.tp.handle is groups.ep.handle is groups.stage.handle


def test_a_rank_alone_on_an_axis_needs_no_communicator() -> None:
    """World 1 has every group and asks for none (`alone` fails when asked)."""
    groups = alone()
    assert all(getattr(groups, a).handle is None and getattr(groups, a).size == 1 for a in AXES)


def test_a_planted_table_changes_positions_and_its_near_miss_does_not() -> None:
    """Reversing the EP table moves rank 0 to the end; a watcher that returns its input does not."""

    def reverse(table: Any, axis: str) -> Any:
        return tuple(ranks[::-1] for ranks in table) if axis == "ep" else table

    faulty, watched = Points(), Points()
    faulty.plant("groups.table", reverse)
    watched.plant("groups.table", lambda table, **_: table)
    assert recorded(FOLDED, 0, faulty)[0].ep.index == 1
    assert recorded(FOLDED, 0, watched)[0].ep.index == 0
    assert recorded(FOLDED, 0, faulty)[0].tp.index == 0
