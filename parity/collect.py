"""Shards of every rank -> full logical tensors, with what the ranks disagree on.

Owns the inverse of a `Placement`: which piece of the full tensor a rank holds, and which rank
holds a given piece. Must not know thresholds or verdicts. Easy to get wrong: a cut in several
segments (a fused gate-up weight) interleaves, so joining the pieces end to end permutes rows;
and replicas are compared by their bits, because NaN != NaN and 0.0 == -0.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parity.implementation import Placement, Shard
from parity.layout import Coordinate, Layout
from parity.protocol import ProtocolError

Key = tuple[int, ...]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Replica:
    """How far the ranks that hold one and the same piece of a tensor agree.

    Attributes:
        entries: entries of the full tensor on which at least one replica differs in its bits.
        ranks: pair that differs on most entries, None where all agree.
        index: full-tensor index of the pair's first differing entry.
        distance: largest |a - b| / |a| over the pairs (inf where not finite), 0.0 where all agree.
        classes: ranks grouped by equal bits, one table entry per group; empty where all agree.
    """

    entries: int = 0
    ranks: tuple[int, int] | None = None
    index: tuple[int, ...] | None = None
    distance: float = 0.0
    classes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Assembled:
    """Full logical tensors rebuilt from the shards of all ranks.

    Attributes:
        tensors: name -> full tensor in the ranks' dtype, None where any rank gave None.
        filled: name -> full tensor with zeros in place of None; absent where every rank gave None.
        missing: name -> ranks that gave None; only names that have such ranks.
        replicas: name -> agreement of the ranks holding equal pieces.
    """

    tensors: Mapping[str, Tensor | None]
    filled: Mapping[str, Tensor]
    missing: Mapping[str, tuple[int, ...]]
    replicas: Mapping[str, Replica]


def agree(placements: Sequence[Mapping[str, Placement]]) -> dict[str, Placement]:
    """Merge the placements that every rank declared.

    Raises:
        ProtocolError: two ranks declare one name differently.
    """
    merged: dict[str, Placement] = {}
    first: dict[str, int] = {}
    for rank, table in enumerate(placements):
        for name, placement in table.items():
            if merged.setdefault(name, placement) != placement:
                raise ProtocolError(
                    f"{name}: ranks {first[name]} and {rank} disagree on its placement "
                    f"({merged[name]} against {placement}); placements must be equal on every rank"
                )
            first.setdefault(name, rank)
    return merged


def assemble(
    layout: Layout,
    placements: Mapping[str, Placement],
    shards: Sequence[Mapping[str, Tensor | None]],
) -> Assembled:
    """Rebuild every full logical tensor from the shards of all ranks.

    Args:
        layout: sizes of both views of the ranks.
        placements: full logical name -> family and cuts, outermost cut first.
        shards: indexed by rank: full logical name -> that rank's piece, None where it has none.

    Raises:
        ProtocolError: a rank is missing, a name is unknown, or pieces do not fit together.
    """
    _check_names(layout, placements, shards)
    coordinates = [layout.coordinate(rank) for rank in range(layout.world)]
    groups: dict[tuple[str, ...], dict[Key, list[int]]] = {}
    tensors: dict[str, Tensor | None] = {}
    filled: dict[str, Tensor] = {}
    missing: dict[str, tuple[int, ...]] = {}
    replicas: dict[str, Replica] = {}
    for name, placement in placements.items():
        axes = tuple(shard.axis for shard in placement.shards)
        if axes not in groups:
            groups[axes] = _by_coordinate(coordinates, axes)
        pieces = _pieces(layout, name, shards)
        absent = tuple(rank for rank, piece in pieces.items() if piece is None)
        replicas[name] = _replica(layout, placement, groups[axes], coordinates, pieces)
        full = _join(layout, name, placement, groups[axes], pieces)
        if full is not None:
            filled[name] = full
        tensors[name] = None if absent else full
        if absent:
            missing[name] = absent
    return Assembled(tensors, filled, missing, replicas)


def owner(
    layout: Layout, placement: Placement, shape: Sequence[int], index: Sequence[int] = ()
) -> int:
    """Name the lowest rank that holds one entry of the full tensor.

    Args:
        layout: sizes of both views of the ranks.
        placement: cuts of the tensor.
        shape: shape of the full tensor.
        index: entry's index; missing trailing dims count as 0 (an expert, a row).
    """
    place = [*index, *(0 for _ in range(len(shape) - len(index)))]
    sizes = list(shape)
    wanted: dict[str, int] = {}
    for shard in placement.shards:
        parts = getattr(layout, shard.axis)
        block = sizes[shard.dim] // shard.segments // parts
        segment, rest = divmod(place[shard.dim], block * parts)
        wanted[shard.axis], offset = divmod(rest, block)
        place[shard.dim] = segment * block + offset
        sizes[shard.dim] //= parts
    for rank in range(layout.world):
        at = layout.coordinate(rank)
        if all(getattr(at, axis) == value for axis, value in wanted.items()):
            return rank
    raise ProtocolError(f"no rank holds index {tuple(index)} of a tensor placed as {placement}")


def bits(tensor: Tensor) -> Tensor:
    """View a tensor's raw bits as integers of the same width."""
    return tensor.view(_BITS[tensor.element_size()])


def _check_names(
    layout: Layout,
    placements: Mapping[str, Placement],
    shards: Sequence[Mapping[str, Tensor | None]],
) -> None:
    if len(shards) != layout.world:
        raise ProtocolError(f"shards of {len(shards)} ranks for a world of {layout.world}")
    for rank, table in enumerate(shards):
        unknown = [name for name in table if name not in placements]
        if unknown:
            raise ProtocolError(f"rank {rank}: {unknown[0]} has no placement")
    for name, placement in placements.items():
        axes = [shard.axis for shard in placement.shards]
        if len(set(axes)) != len(axes):
            raise ProtocolError(f"{name}: cut twice over one axis ({', '.join(axes)})")


def _by_coordinate(coordinates: Sequence[Coordinate], axes: Sequence[str]) -> dict[Key, list[int]]:
    """Group ranks by their coordinates on the given axes; pp never tells replicas apart."""
    table: dict[Key, list[int]] = {}
    for rank, at in enumerate(coordinates):
        table.setdefault(tuple(getattr(at, axis) for axis in axes), []).append(rank)
    return table


def _pieces(
    layout: Layout, name: str, shards: Sequence[Mapping[str, Tensor | None]]
) -> dict[int, Tensor | None]:
    """Collect one tensor's pieces by rank; whole pipeline stages may lack the name."""
    pieces = {rank: table[name] for rank, table in enumerate(shards) if name in table}
    if len(pieces) != layout.world:
        size = layout.stage_size
        held = {rank // size for rank in pieces}
        lacking = [r for r in range(layout.world) if r not in pieces and r // size in held]
        if lacking or not held:
            raise ProtocolError(f"{name}: not handed over by ranks {lacking or 'of any stage'}")
    reference: tuple[int, Tensor] | None = None
    for rank, piece in pieces.items():
        if piece is None:
            continue
        if reference is None:
            reference = rank, piece
        elif piece.shape != reference[1].shape or piece.dtype != reference[1].dtype:
            raise ProtocolError(
                f"{name}: rank {rank} holds {tuple(piece.shape)} {piece.dtype}, rank "
                f"{reference[0]} holds {tuple(reference[1].shape)} {reference[1].dtype}; "
                "the pieces of all ranks must be equally large"
            )
    return pieces


def _join(
    layout: Layout,
    name: str,
    placement: Placement,
    groups: Mapping[Key, list[int]],
    pieces: Mapping[int, Tensor | None],
) -> Tensor | None:
    """Join the first piece of every shard coordinate, innermost cut first; None if all are."""
    some = next((piece for piece in pieces.values() if piece is not None), None)
    if some is None:
        return None
    for shard in placement.shards:
        if shard.dim >= some.dim() or some.shape[shard.dim] % shard.segments:
            raise ProtocolError(
                f"{name}: {shard} does not fit a piece of shape {tuple(some.shape)}"
            )
    parts = {key: _first(pieces, ranks, some) for key, ranks in groups.items()}
    for shard in reversed(placement.shards):
        size = getattr(layout, shard.axis)
        heads = dict.fromkeys(key[:-1] for key in parts)
        parts = {head: _cat([parts[(*head, c)] for c in range(size)], shard) for head in heads}
    return parts[()]


def _first(pieces: Mapping[int, Tensor | None], ranks: Iterable[int], some: Tensor) -> Tensor:
    for rank in ranks:
        piece = pieces.get(rank)
        if piece is not None:
            return piece
    return torch.zeros_like(some)


def _cat(parts: list[Tensor], shard: Shard) -> Tensor:
    """Put pieces in axis order; with segments, block s of every piece makes up segment s."""
    if len(parts) == 1:
        return parts[0]
    if shard.segments == 1:
        return torch.cat(parts, shard.dim)
    shape = parts[0].shape
    split = (*shape[: shard.dim], shard.segments, -1, *shape[shard.dim + 1 :])
    blocks = [part.reshape(split) for part in parts]
    return torch.cat(blocks, shard.dim + 1).flatten(shard.dim, shard.dim + 1)


def _replica(
    layout: Layout,
    placement: Placement,
    groups: Mapping[Key, list[int]],
    coordinates: Sequence[Coordinate],
    pieces: Mapping[int, Tensor | None],
) -> Replica:
    """Compare the bits of every group of replicas with its first rank."""
    entries, worst, distance = 0, 0, 0.0
    pair: tuple[int, int] | None = None
    index: tuple[int, ...] | None = None
    classes: list[tuple[int, ...]] = []
    for ranks in groups.values():
        held = [rank for rank in ranks if rank in pieces]
        odd = _differing(held, pieces)
        if not odd:
            continue
        classes += _classes(held, pieces)
        entries += int(torch.stack(list(odd.values())).any(dim=0).sum())
        rank, mask = max(odd.items(), key=lambda item: int(item[1].sum()))
        distance = max(distance, *(_distance(pieces[held[0]], pieces[r]) for r in odd))
        if int(mask.sum()) > worst:
            worst, pair = int(mask.sum()), (held[0], rank)
            local = [int(i) for i in mask.nonzero()[0]]
            index = _full_index(layout, placement, coordinates[rank], mask.shape, local)
    return Replica(entries, pair, index, distance, tuple(classes))


def _differing(ranks: Sequence[int], pieces: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
    """Rank -> mask of entries whose bits differ from the first rank's; only ranks that differ.

    None on one replica and a tensor on another differ on every entry.
    """
    if len(ranks) < 2:
        return {}
    first = pieces[ranks[0]]
    first_bits = None if first is None else bits(first)
    odd: dict[int, Tensor] = {}
    for rank in ranks[1:]:
        piece = pieces[rank]
        if first_bits is not None and piece is not None:
            if not torch.equal(first_bits, bits(piece)):
                odd[rank] = first_bits != bits(piece)
        elif first_bits is not None or piece is not None:
            some = first if first is not None else piece
            assert some is not None
            odd[rank] = torch.ones_like(some, dtype=torch.bool)
    return odd


def _distance(first: Tensor | None, other: Tensor | None) -> float:
    if first is None or other is None:
        return math.inf
    a, b = first.double(), other.double()
    if torch.equal(a, b):
        return 0.0
    value = float((a - b).norm() / a.norm())
    return value if math.isfinite(value) else math.inf


def _classes(ranks: Sequence[int], pieces: Mapping[int, Tensor | None]) -> list[tuple[int, ...]]:
    """Group ranks whose pieces are equal bit for bit."""
    table: dict[bytes | None, list[int]] = {}
    for rank in ranks:
        piece = pieces[rank]
        value = None if piece is None else bits(piece.contiguous()).numpy().tobytes()
        table.setdefault(value, []).append(rank)
    return [tuple(group) for group in table.values()]


def _full_index(
    layout: Layout,
    placement: Placement,
    at: Coordinate,
    shape: Sequence[int],
    local: Sequence[int],
) -> tuple[int, ...]:
    """Turn an index into one rank's piece into an index of the full tensor."""
    place, sizes = list(local), list(shape)
    for shard in reversed(placement.shards):
        parts = getattr(layout, shard.axis)
        block = sizes[shard.dim] // shard.segments
        segment, offset = divmod(place[shard.dim], block)
        place[shard.dim] = (segment * parts + getattr(at, shard.axis)) * block + offset
        sizes[shard.dim] *= parts
    return tuple(place)
