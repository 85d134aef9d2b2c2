"""Covering arrays: every possible pair of values, deterministically, within constraints."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from parity.covering import Constraint, coverage, covering


def pairs(cells: list[tuple[int, ...]]) -> set[tuple[int, int, int, int]]:
    """List the pairs that occur, by a loop of the test's own."""
    return {
        (i, cell[i], j, cell[j])
        for cell in cells
        for i, j in itertools.combinations(range(len(cell)), 2)
    }


def test_two_axes_need_their_product() -> None:
    """With two axes every pair is a cell: 2 x 3 cells, each once."""
    assert sorted(covering([2, 3])) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_ten_switches_need_few_cells() -> None:
    """Ten switches have 1024 combinations; a dozen cells hold all 180 pairs."""
    cells = covering([2] * 10)
    assert len(pairs(cells)) == 180
    assert len(cells) <= 12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_every_pair_occurs_and_cells_are_distinct(sizes: list[int]) -> None:
    """Whatever the sizes, no pair is missing, no cell is there twice, and it is repeatable."""
    cells = covering(sizes)
    wanted = sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(pairs(cells)) == wanted
    assert len({*cells}) == len(cells)
    assert covering(sizes) == cells


def test_a_minimum_is_reached_with_new_cells() -> None:
    """Asked for 20 of 27 cells, it gives 20 distinct ones; asked for more than exist, all 27."""
    assert len({*covering([3, 3, 3], at_least=20)}) >= 20
    assert len({*covering([3, 3, 3], at_least=100)}) == 27


def test_excluded_pairs_are_avoided_and_counted() -> None:
    """0 of the first axis never meets 1 of the second; the other pairs are all there."""
    never = Constraint((0, 1), lambda values: values == (0, 1))
    cells = covering([2, 2, 2], [never])
    assert (0, 0, 1, 1) not in pairs(cells)
    assert coverage([2, 2, 2], cells, [never]) == (11, 11, 1)


def test_a_pair_without_any_third_value_is_impossible() -> None:
    """0 and 0 may meet, but every value of the third axis is excluded with one of them."""
    rules = [
        Constraint((0, 2), lambda values: values == (0, 0)),
        Constraint((1, 2), lambda values: values == (0, 1)),
    ]
    cells = covering([2, 2, 2], rules)
    assert (0, 0, 1, 0) not in pairs(cells)
    assert coverage([2, 2, 2], cells, rules) == (9, 9, 3)


def test_a_missing_pair_is_seen() -> None:
    """Without the only cell of a pair the coverage is short of the possible pairs."""
    assert coverage([2, 2], [(0, 0), (0, 1), (1, 0)]) == (3, 4, 0)
