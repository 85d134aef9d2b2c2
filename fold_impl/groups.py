"""Rank tables to process groups, in both views of a stage.

Owns which communicator a collective of the folded model runs on. Must not know modules or
gradients. Easy to get wrong: every rank must ask for every table in the same order, also for
groups it is not in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from fold_impl.layout import FoldAxis, FoldLayout
from fold_impl.points import Points

NewGroup = Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class Group:
    """One communicator as seen by a rank; `handle` is None where the rank is alone in it."""

    ranks: tuple[int, ...]
    index: int
    """Position of this rank in `ranks`."""
    handle: Any

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class FoldGroups:
    """The communicators one rank takes part in."""

    layout: FoldLayout
    rank: int
    tp: Group
    dp: Group
    ep: Group
    etp: Group
    edp: Group
    stage: Group
    """All ranks of the stage: tp x dp."""


AXES: tuple[FoldAxis, ...] = ("tp", "dp", "ep", "etp", "edp", "stage")


def build_groups(
    layout: FoldLayout,
    rank: int,
    new_group: NewGroup = dist.new_group,
    points: Points | None = None,
) -> FoldGroups:
    """Create (or fetch, if new_group caches) the groups of every axis.

    Collective: every rank of the world calls it with the same layout.
    """
    points = points or Points()
    made: dict[tuple[int, ...], Any] = {}
    chosen: dict[str, Group] = {}
    for axis in AXES:
        for ranks in points("groups.table", layout.groups(axis), axis=axis):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = new_group(ranks)
            if rank in ranks:
                chosen[axis] = Group(ranks, ranks.index(rank), made.get(ranks))
    return FoldGroups(layout=layout, rank=rank, **chosen)
