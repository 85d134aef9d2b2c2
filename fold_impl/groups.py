"""Rank tables to process groups, in both views of a stage.

Owns which communicator a collective of the folded model runs on. Must not know modules or
gradients. Easy to get wrong: every rank must ask for every table in the same order, also for
groups it is not in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import _broadcast_coalesced

from fold_impl.layout import FoldAxis, FoldLayout
from fold_impl.points import Points

NewGroup = Callable[[Sequence[int]], Any]
BROADCAST_BYTES = 1 << 28
"""Size of one message when engines start: torch's DistributedDataParallel takes 250 MiB."""


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

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Give every rank the first one's values: broadcast, flat, BROADCAST_BYTES at a time.

        Who must call: all of the group, with tensors of the same shapes.
        """
        if self.handle is not None and tensors:
            _broadcast_coalesced(self.handle, tensors, BROADCAST_BYTES, 0)


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
