"""Which rectangles of a full tensor a rank holds, and which rank writes them.

Owns the translation of a `Placement` into offsets, for one layout. Must not know torch or files.
Easy to get wrong: a cut in segments (a fused gate-up weight) leaves a rank several rectangles that
lie next to one another in its part but far apart in the full tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from fold_impl.families import Placement, Shard
from fold_impl.layout import FoldLayout

Size = tuple[int, ...]


class Block(NamedTuple):
    """A rectangle that a rank holds: `offset` in the full tensor, `local` in the rank's part."""

    offset: Size
    local: Size
    shape: Size


class Overlap(NamedTuple):
    """What a stored block and a wanted block share: starts in the two parts, and the shape."""

    stored: Size
    wanted: Size
    shape: Size


class _Run(NamedTuple):
    start: int
    length: int


def axis_size(layout: FoldLayout, shard: Shard) -> int:
    """Give the number of parts of one cut."""
    return layout.strided(shard.axis).size


def full_shape(part: Sequence[int], placement: Placement, layout: FoldLayout) -> Size:
    """Give the full tensor's shape from that of a part."""
    sizes = list(part)
    for shard in placement.shards:
        sizes[shard.dim] *= axis_size(layout, shard)
    return tuple(sizes)


def part_shape(full: Sequence[int], placement: Placement, layout: FoldLayout) -> Size:
    """Give a part's shape from the full tensor's."""
    sizes = list(full)
    for shard in placement.shards:
        sizes[shard.dim] //= axis_size(layout, shard)
    return tuple(sizes)


def tiles(full: Sequence[int], placement: Placement, layout: FoldLayout) -> bool:
    """Tell whether every cut divides the dimension it cuts."""
    sizes = list(full)
    for shard in placement.shards:
        count = axis_size(layout, shard)
        if shard.dim >= len(sizes) or sizes[shard.dim] % (count * shard.segments):
            return False
        sizes[shard.dim] //= count
    return True


def blocks(full: Sequence[int], placement: Placement, layout: FoldLayout, rank: int) -> list[Block]:
    """List the rectangles of a rank's part, in the order of the part's entries."""
    runs = [[_Run(0, size)] for size in full]
    for shard in placement.shards:
        index = layout.rank_in(shard.axis, rank)
        runs[shard.dim] = _cut(runs[shard.dim], shard, axis_size(layout, shard), index)
    found = []
    for chosen in itertools.product(*(_placed(dim) for dim in runs)):
        offset = tuple(run.start for run, _ in chosen)
        local = tuple(at for _, at in chosen)
        found.append(Block(offset, local, tuple(run.length for run, _ in chosen)))
    return found


def _cut(runs: Sequence[_Run], shard: Shard, count: int, index: int) -> list[_Run]:
    """Cut one dimension as `convert.cut` does: part `index` of `count` of every segment."""
    length = sum(run.length for run in runs)
    segment, rest = divmod(length, shard.segments)
    part, left = divmod(segment, count)
    assert rest == left == 0, f"{length} entries into {shard.segments} x {count}"
    kept: list[_Run] = []
    for number in range(shard.segments):
        for run in _taken(runs, number * segment + index * part, part):
            if kept and sum(kept[-1]) == run.start:
                kept[-1] = _Run(kept[-1].start, kept[-1].length + run.length)
            else:
                kept.append(run)
    return kept


def _taken(runs: Sequence[_Run], first: int, length: int) -> list[_Run]:
    """Give the runs of positions first to first + length, counted over all runs."""
    kept, before = [], 0
    for run in runs:
        low, high = max(first - before, 0), min(first + length - before, run.length)
        if low < high:
            kept.append(_Run(run.start + low, high - low))
        before += run.length
    return kept


def _placed(runs: Sequence[_Run]) -> list[tuple[_Run, int]]:
    starts = itertools.accumulate((run.length for run in runs), initial=0)
    return list(zip(runs, starts, strict=False))


def writers(placement: Placement, layout: FoldLayout) -> list[int]:
    """Name the ranks that write: the lowest of those that hold the same part, one per part."""
    seen: dict[Size, int] = {}
    for rank in range(layout.stage_size):
        seen.setdefault(tuple(layout.rank_in(s.axis, rank) for s in placement.shards), rank)
    return list(seen.values())


def overlap(stored: Block, wanted: Block) -> Overlap | None:
    """Intersect two rectangles of one full tensor; None where they share nothing."""
    low = tuple(map(max, stored.offset, wanted.offset))
    ends = (
        (s + n, w + m)
        for s, n, w, m in zip(stored.offset, stored.shape, wanted.offset, wanted.shape, strict=True)
    )
    shape = tuple(min(both) - at for both, at in zip(ends, low, strict=True))
    if any(size <= 0 for size in shape):
        return None
    inside = tuple(at - start for at, start in zip(low, stored.offset, strict=True))
    place = zip(low, wanted.offset, wanted.local, strict=True)
    return Overlap(inside, tuple(at - start + local for at, start, local in place), shape)
