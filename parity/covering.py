"""Choose cells of a matrix that is too large to run whole: every pair of values at least once.

Owns the covering array: greedy, deterministic, with constraints. Must not know cases: an axis is a
number of values, a cell is one index per axis. Easy to get wrong: a pair may be impossible only
because no third value goes with both, so a cell is completed with backtracking.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

Pair = tuple[int, int, int, int]
"""(axis, value, later axis, value)."""


class Constraint(NamedTuple):
    """Combination of values that no cell may have."""

    axes: tuple[int, ...]
    forbids: Callable[[tuple[int, ...]], bool]
    """Values of `axes`, in that order -> whether they exclude one another."""


class Coverage(NamedTuple):
    """How many pairs of values occur among cells; `impossible` ones no cell can have."""

    covered: int
    possible: int
    impossible: int


def pairs_of(cell: Sequence[int]) -> Iterator[Pair]:
    """List the pairs of one cell."""
    for (i, a), (j, b) in itertools.combinations(enumerate(cell), 2):
        yield i, a, j, b


def all_pairs(sizes: Sequence[int]) -> Iterator[Pair]:
    """List every pair of values of two axes."""
    for (i, m), (j, n) in itertools.combinations(enumerate(sizes), 2):
        for a, b in itertools.product(range(m), range(n)):
            yield i, a, j, b


def covering(
    sizes: Sequence[int], constraints: Sequence[Constraint] = (), at_least: int = 0
) -> list[tuple[int, ...]]:
    """Choose cells so that every possible pair of values occurs.

    Args:
        sizes: number of values of each axis.
        constraints: combinations to avoid.
        at_least: go on, each pair once more in other company, until there are so many cells (or
            no new one is found).

    Returns:
        Distinct cells, in the order they were chosen; the same for the same arguments.
    """
    return _Search(sizes, constraints).cells(at_least)


def coverage(
    sizes: Sequence[int], cells: Sequence[Sequence[int]], constraints: Sequence[Constraint] = ()
) -> Coverage:
    """Count the pairs that occur, those that could, and those no cell can have."""
    covered = {pair for cell in cells for pair in pairs_of(cell)}
    search = _Search(sizes, constraints)
    missing = [pair for pair in all_pairs(sizes) if pair not in covered]
    impossible = sum(search.completed(pair) is None for pair in missing)
    return Coverage(len(covered), len(covered) + len(missing) - impossible, impossible)


class _Search:
    """Greedy search: counts how often each pair was taken and prefers the rarest."""

    def __init__(self, sizes: Sequence[int], constraints: Sequence[Constraint]) -> None:
        self.sizes = sizes
        self.taken = dict.fromkeys(all_pairs(sizes), 0)
        self.uses = [[0] * size for size in sizes]
        self.by_axis: list[list[Constraint]] = [[] for _ in sizes]
        for constraint in constraints:
            for axis in constraint.axes:
                self.by_axis[axis].append(constraint)

    def cells(self, at_least: int) -> list[tuple[int, ...]]:
        chosen: dict[tuple[int, ...], None] = {}
        impossible: set[Pair] = set()
        for times in itertools.count(1):
            before = len(chosen)
            for pair in self.taken:
                enough = times > 1 and len(chosen) >= at_least
                if enough or pair in impossible or self.taken[pair] >= times:
                    continue
                cell = self.completed(pair)
                if cell is None:
                    impossible.add(pair)
                elif cell not in chosen:
                    chosen[cell] = None
                    self._count(cell)
            if len(chosen) >= at_least or len(chosen) == before:
                return list(chosen)
        raise AssertionError("not reached")

    def _count(self, cell: tuple[int, ...]) -> None:
        for pair in pairs_of(cell):
            self.taken[pair] += 1
        for axis, value in enumerate(cell):
            self.uses[axis][value] += 1

    def completed(self, pair: Pair) -> tuple[int, ...] | None:
        """Give a cell with this pair whose other pairs are rare; None: there is no such cell."""
        i, a, j, b = pair
        given = {i: a, j: b}
        if not (self._allowed(given, i) and self._allowed(given, j)):
            return None
        rest = sorted((x for x in range(len(self.sizes)) if x not in given), key=self._negative)
        return self._complete(given, rest)

    def _negative(self, axis: int) -> tuple[int, int]:
        return -self.sizes[axis], axis

    def _complete(self, given: dict[int, int], rest: Sequence[int]) -> tuple[int, ...] | None:
        if not rest:
            return tuple(given[axis] for axis in range(len(self.sizes)))
        axis = rest[0]
        for value in sorted(range(self.sizes[axis]), key=lambda v: self._cost(given, axis, v)):
            given[axis] = value
            if self._allowed(given, axis) and (cell := self._complete(given, rest[1:])):
                return cell
            del given[axis]
        return None

    def _cost(self, given: Mapping[int, int], axis: int, value: int) -> tuple[int, int, int, int]:
        """Fewest pairs already taken first, then the rarest pairs, then the rarest value."""
        counts = [
            self.taken[(o, v, axis, value) if o < axis else (axis, value, o, v)]
            for o, v in given.items()
        ]
        return sum(map(bool, counts)), sum(counts), self.uses[axis][value], value

    def _allowed(self, given: Mapping[int, int], axis: int) -> bool:
        return not any(
            all(other in given for other in c.axes)
            and c.forbids(tuple(given[other] for other in c.axes))
            for c in self.by_axis[axis]
        )
