"""Rank tables of folding, derived as strided axes: every axis is one pair (size, stride).

Owns the sizes and the groups of both views. Must not know config, torch or the harness, whose
own tables are derived differently on purpose. Easy to get wrong: the stride of an axis is the
product of the faster axes *of its own view*, so `dp` steps by tp and `edp` steps by ep * etp.

The trick: with tp, etp fastest and the stage slowest, rank r has coordinate (r // stride) % size
on an axis, and the group through r is the arithmetic progression with that stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

FoldAxis = Literal["tp", "dp", "ep", "etp", "edp", "stage", "expert_model"]
FOLD_AXES: tuple[FoldAxis, ...] = get_args(FoldAxis)


class LayoutError(ValueError):
    """One size that cannot be folded.

    Args:
        problem: What is wrong with it.
        key: Name of the size, as `FoldLayout` takes it.
        value: What was given.
        allowed: What would do in its place.
    """

    def __init__(self, problem: str, key: str, value: object, allowed: str | tuple[int, ...]):
        super().__init__(problem, key, value, allowed)
        self.problem, self.key, self.value, self.allowed = problem, key, value, allowed

    def __str__(self) -> str:
        choices = self.allowed
        options = choices if isinstance(choices, str) else ", ".join(map(str, choices))
        return f"{self.key} = {self.value!r}: {self.problem}; allowed: {options}"


class StridedAxis(NamedTuple):
    """Members of a group are `size` ranks, `stride` apart."""

    size: int
    stride: int


def divisors(number: int) -> tuple[int, ...]:
    """List the positive divisors in increasing order."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


@dataclass(frozen=True)
class FoldLayout:
    """Sizes of one stage seen as tp x dp and as ep x etp x edp; dp and edp are derived.

    Raises:
        LayoutError: a size is not a positive integer, or a view does not tile the stage.
    """

    world_size: int
    tp_size: int = 1
    ep_size: int = 1
    etp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        for key in ("world_size", "pp_size", "tp_size", "etp_size", "ep_size"):
            size = getattr(self, key)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise LayoutError("not a positive integer", key, size, "1, 2, 3, ...")
        self._require_tiling("pp_size", self.world_size, f"world of {self.world_size}")
        stage, beside = f"stage of {self.stage_size}", f" beside etp {self.etp_size}"
        self._require_tiling("tp_size", self.stage_size, stage)
        self._require_tiling("etp_size", self.stage_size, stage)
        per_etp = self.stage_size // self.etp_size
        self._require_tiling("ep_size", per_etp, stage, beside if self.etp_size > 1 else "")

    def _require_tiling(self, key: str, whole: int, of_what: str, beside: str = "") -> None:
        size = getattr(self, key)
        if whole % size:
            problem = f"does not tile the {of_what} ranks{beside}"
            raise LayoutError(problem, key, size, divisors(whole))

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage: tp * dp == ep * etp * edp."""
        return self.world_size // self.pp_size

    @property
    def dp_size(self) -> int:
        """Data-parallel size of the dense view."""
        return self.stage_size // self.tp_size

    @property
    def edp_size(self) -> int:
        """Data-parallel size of the expert view."""
        return self.stage_size // (self.ep_size * self.etp_size)

    def strided(self, axis: FoldAxis) -> StridedAxis:
        """Give size and stride of an axis; "expert_model" is ep x etp, "stage" all of a stage."""
        tp, ep, etp = self.tp_size, self.ep_size, self.etp_size
        if axis in ("stage", "expert_model"):
            return StridedAxis(self.stage_size if axis == "stage" else ep * etp, 1)
        if axis in ("tp", "dp"):
            return StridedAxis(tp, 1) if axis == "tp" else StridedAxis(self.dp_size, tp)
        if axis in ("etp", "ep"):
            return StridedAxis(etp, 1) if axis == "etp" else StridedAxis(ep, etp)
        if axis == "edp":
            return StridedAxis(self.edp_size, ep * etp)
        raise LayoutError("no such axis", "axis", axis, ", ".join(FOLD_AXES))

    def groups(self, axis: FoldAxis) -> tuple[tuple[int, ...], ...]:
        """List the groups of global ranks along an axis, by first rank; members increase."""
        size, stride = self.strided(axis)
        firsts = (rank for rank in range(self.world_size) if rank // stride % size == 0)
        return tuple(tuple(range(first, first + size * stride, stride)) for first in firsts)

    def group_of(self, axis: FoldAxis, rank: int) -> tuple[int, ...]:
        """Give the group of global ranks along an axis that holds `rank`."""
        size, stride = self.strided(axis)
        first = rank - self.rank_in(axis, rank) * stride
        return tuple(range(first, first + size * stride, stride))

    def rank_in(self, axis: FoldAxis, rank: int) -> int:
        """Give the coordinate of a global rank along an axis, its place in `group_of`."""
        if not 0 <= rank < self.world_size:
            raise LayoutError("no such rank", "rank", rank, f"0 to {self.world_size - 1}")
        size, stride = self.strided(axis)
        return rank // stride % size
