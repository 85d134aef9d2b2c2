"""The harness's own rank tables against tables by hand and their invariants."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.errors import UsageError
from parity.layout import AXES, Axis, Layout

untimed = settings(deadline=None)  # a busy machine is no failure
LANES_OF_2 = "01 23 45 67"
LANES_OF_4 = "0123 4567"
PAIRS = "04 15 26 37"

TABLES = [
    ((4, 2, 4, 1), "01 23", "02 13", "0123", "0 1 2 3", "0 1 2 3"),
    ((4, 4, 4, 1), "0123", "0 1 2 3", "0123", "0 1 2 3", "0 1 2 3"),
    ((8, 2, 4, 1), LANES_OF_2, "0246 1357", LANES_OF_4, PAIRS, "0 1 2 3 4 5 6 7"),
    ((8, 4, 4, 1), LANES_OF_4, PAIRS, LANES_OF_4, PAIRS, "0 1 2 3 4 5 6 7"),
    ((8, 4, 2, 1), LANES_OF_4, PAIRS, LANES_OF_2, "0246 1357", "0 1 2 3 4 5 6 7"),
    ((8, 2, 2, 2), LANES_OF_2, "0246 1357", "02 13 46 57", PAIRS, LANES_OF_2),
]
"""(world, tp, ep, etp), then the groups of tp, dp, ep, edp, etp, written by hand."""


def table(text: str) -> tuple[tuple[int, ...], ...]:
    """Read "01 23" as ((0, 1), (2, 3))."""
    return tuple(tuple(map(int, group)) for group in text.split())


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw sizes first and the world from them, so that nothing is filtered."""
    small = st.integers(1, 4)
    ep, etp, pp = draw(small), draw(small), draw(st.integers(1, 2))
    stage = ep * etp * draw(small)
    tp = draw(st.sampled_from([d for d in range(1, stage + 1) if stage % d == 0]))
    return Layout(world=stage * pp, tp=tp, ep=ep, etp=etp, pp=pp)


@pytest.mark.parametrize(("sizes", "tp", "dp", "ep", "edp", "etp"), TABLES)
def test_tables_equal_those_written_by_hand(
    sizes: tuple[int, int, int, int], tp: str, dp: str, ep: str, edp: str, etp: str
) -> None:
    """Lane fastest in the dense view; etp, then ep, then edp in the expert view."""
    world, tp_size, ep_size, etp_size = sizes
    layout = Layout(world=world, tp=tp_size, ep=ep_size, etp=etp_size)
    by_hand: dict[Axis, str] = {"tp": tp, "dp": dp, "ep": ep, "edp": edp, "etp": etp}
    for axis, text in by_hand.items():
        assert layout.groups(axis) == table(text), axis


def test_second_pipeline_stage_repeats_the_first_shifted() -> None:
    """World 8, pp 2: no group crosses rank 3 to 4."""
    layout = Layout(world=8, tp=2, ep=4, pp=2)
    assert layout.groups("dp") == table("02 13 46 57")
    assert layout.groups("ep") == table("0123 4567")


@untimed
@given(layouts())
def test_every_rank_is_in_exactly_one_group_per_axis(layout: Layout) -> None:
    """The groups of an axis partition the world into equal parts."""
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(r for group in groups for r in group) == list(range(layout.world))
        assert {len(group) for group in groups} == {getattr(layout, axis)}


@untimed
@given(layouts())
def test_both_views_count_the_same_ranks(layout: Layout) -> None:
    """tp * dp == ep * etp * edp == stage size."""
    assert layout.tp * layout.dp == layout.stage_size
    assert layout.ep * layout.etp * layout.edp == layout.stage_size


@untimed
@given(layouts())
def test_coordinates_of_either_view_give_the_rank_back(layout: Layout) -> None:
    """The maps rank -> (pp, dp, tp) and rank -> (pp, edp, ep, etp) are invertible."""
    for rank in range(layout.world):
        at = layout.coordinate(rank)
        stage = at.pp * layout.stage_size
        assert stage + at.dp * layout.tp + at.tp == rank
        assert stage + (at.edp * layout.ep + at.ep) * layout.etp + at.etp == rank


@untimed
@given(layouts())
def test_members_of_a_group_differ_on_its_axis_only(layout: Layout) -> None:
    """Place k of a group has coordinate k on the axis; the rest of that view is shared."""
    for axis in AXES:
        view = ("pp", "tp", "dp") if axis in ("tp", "dp") else ("pp", "ep", "etp", "edp")
        for group in layout.groups(axis):
            at = [layout.coordinate(rank) for rank in group]
            assert [getattr(c, axis) for c in at] == list(range(len(group)))
            for other in set(view) - {axis}:
                assert len({getattr(c, other) for c in at}) == 1


def test_baseline_has_one_rank_per_data_parallel_shard() -> None:
    """World 12, tp 3 has dp 4; its baseline is a world of 4 without folding."""
    assert Layout(world=12, tp=3, ep=6).baseline() == Layout(world=4)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"world": 8, "ep": 3}, r"3 does not divide the stage of 8 ranks; allowed: 1, 2, 4, 8"),
        ({"world": 8, "tp": 3}, r"tp = 3 does not divide"),
        ({"world": 8, "ep": 4, "etp": 4}, r"ep\*etp = 16"),
        ({"world": 9, "pp": 2}, r"world 9 is not a multiple of pp 2"),
        ({"world": 8, "tp": 0}, r"tp must be a positive integer \(got 0\)"),
    ],
    ids=["ep", "tp", "ep-etp", "pp", "zero"],
)
def test_sizes_that_do_not_tile_are_refused_with_what_would(
    sizes: dict[str, int], said: str
) -> None:
    """A shape that does not tile is a usage error (exit code 2)."""
    with pytest.raises(UsageError, match=said) as caught:
        Layout(**sizes)
    assert caught.value.exit_code == 2
