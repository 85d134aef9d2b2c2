"""Rank algebra of parallel folding: pure integers, no process and no group.

Owns how one stage of ranks is seen twice, as tp x dp (dense) and as ep x etp x edp (experts).
Must not know torch. Easy to get wrong: the dense order has tp fastest, the expert order has
etp fastest, then ep, then edp, and both number the *same* ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from parity.errors import UsageError

Axis = Literal["tp", "dp", "ep", "etp", "edp"]
AXES: tuple[Axis, ...] = ("tp", "dp", "ep", "etp", "edp")


class Coordinate(NamedTuple):
    """Position of one rank on every axis of both views."""

    pp: int
    tp: int
    dp: int
    ep: int
    etp: int
    edp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of both views of one stage; `dp` and `edp` are derived and cannot be set.

    Raises:
        UsageError: a size is not positive or a view does not tile the stage.
    """

    world: int
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for key in ("world", "tp", "ep", "etp", "pp"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} must be a positive integer (got {getattr(self, key)})")
        if self.world % self.pp:
            raise UsageError(f"world {self.world} is not a multiple of pp {self.pp}")
        for what, size in (("tp", self.tp), ("ep*etp", self.ep * self.etp)):
            if self.stage_size % size:
                divisors = [d for d in range(1, self.stage_size + 1) if self.stage_size % d == 0]
                raise UsageError(
                    f"{what} = {size} does not divide the stage of {self.stage_size} ranks; "
                    f"allowed: {', '.join(map(str, divisors))}"
                )

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pp

    @property
    def dp(self) -> int:
        """Data-parallel size of the dense view."""
        return self.stage_size // self.tp

    @property
    def edp(self) -> int:
        """Data-parallel size of the expert view."""
        return self.stage_size // (self.ep * self.etp)

    def coordinate(self, rank: int) -> Coordinate:
        """Locate a global rank on every axis."""
        stage, inside = divmod(rank, self.stage_size)
        dp, tp = divmod(inside, self.tp)
        rest, etp = divmod(inside, self.etp)
        edp, ep = divmod(rest, self.ep)
        return Coordinate(stage, tp, dp, ep, etp, edp)

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """List the rank groups along one axis, each in increasing order of that axis."""
        dense = axis in ("tp", "dp")
        fixed = [a for a in (("tp", "dp") if dense else ("ep", "etp", "edp")) if a != axis]
        table: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            at = self.coordinate(rank)
            key = (at.pp, *(getattr(at, a) for a in fixed))
            table.setdefault(key, []).append(rank)
        return tuple(
            tuple(sorted(g, key=lambda r: getattr(self.coordinate(r), axis)))
            for g in table.values()
        )

    def baseline(self) -> Layout:
        """Give the non-folded layout on the same data-parallel shards."""
        return Layout(world=self.dp)
