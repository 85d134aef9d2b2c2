"""Rectangles of a rank's part, by hand; and that the parts tile the whole."""

from __future__ import annotations

import itertools
import math

import pytest

from fold_impl.blocks import Block, blocks, full_shape, overlap, part_shape, tiles, writers
from fold_impl.families import Placement, Shard
from fold_impl.layout import FoldLayout

LAYOUT = FoldLayout(8, tp_size=4, ep_size=2, etp_size=2)
DENSE = Placement("attention", (Shard("tp", 1),))
EXPERT = Placement("expert", (Shard("ep", 0), Shard("etp", 1, segments=2)))
WHOLE = Placement("layernorm")


def test_a_dense_cut_is_one_rectangle_of_the_lane() -> None:
    """Rank 6 of tp 4 is lane 2: columns 4 and 5 of 8."""
    assert blocks((3, 8), DENSE, LAYOUT, 6) == [Block((0, 4), (0, 0), (3, 2))]


def test_a_fused_weight_leaves_one_rectangle_per_segment() -> None:
    """Rank 3 is ep 1, etp 1: experts 2 and 3, rows 2-3 of the gate and 6-7 of the up half.

    In its part, the up rows follow the gate's at once.
    """
    assert blocks((4, 8, 5), EXPERT, LAYOUT, 3) == [
        Block((2, 2, 0), (0, 0, 0), (2, 2, 5)),
        Block((2, 6, 0), (0, 2, 0), (2, 2, 5)),
    ]


def test_without_a_cut_segments_join_again() -> None:
    """An axis of size 1 leaves the dimension in one piece."""
    alone = FoldLayout(1)
    assert blocks((4, 8, 5), EXPERT, alone, 0) == [Block((0, 0, 0), (0, 0, 0), (4, 8, 5))]


def test_two_cuts_of_one_dimension_nest() -> None:
    """ep outside, etp inside: of 8 rows rank 3 (ep 1, etp 1) holds 6 and 7."""
    nested = Placement("expert", (Shard("ep", 0), Shard("etp", 0)))
    assert blocks((8,), nested, LAYOUT, 3) == [Block((6,), (0,), (2,))]


def test_a_number_is_a_rectangle_without_sides() -> None:
    """A 0-d counter has one entry."""
    assert blocks((), WHOLE, LAYOUT, 5) == [Block((), (), ())]
    assert overlap(Block((), (), ()), Block((), (), ())) == ((), (), ())


@pytest.mark.parametrize(
    ("placement", "expected"), [(WHOLE, [0]), (DENSE, [0, 1, 2, 3]), (EXPERT, [0, 1, 2, 3])]
)
def test_the_lowest_rank_of_each_part_writes(placement: Placement, expected: list[int]) -> None:
    """Replicas do not write: dp 1 and edp 1 hold what ranks 0 to 3 hold."""
    assert writers(placement, LAYOUT) == expected


def test_an_expert_is_written_by_other_ranks_than_a_dense_weight() -> None:
    """tp 2, ep 4 on 4 ranks: dense parts lie on lanes 0 and 1, experts on all four ranks."""
    layout = FoldLayout(4, tp_size=2, ep_size=4)
    assert writers(DENSE, layout) == [0, 1]
    assert writers(Placement("expert", (Shard("ep", 0),)), layout) == [0, 1, 2, 3]


@pytest.mark.parametrize("placement", [WHOLE, DENSE, EXPERT], ids=["whole", "dense", "expert"])
def test_the_writers_parts_tile_the_tensor(placement: Placement) -> None:
    """Every entry is held by exactly one writer."""
    shape = (4, 8, 5)
    seen: dict[tuple[int, ...], int] = {}
    for rank in writers(placement, LAYOUT):
        for block in blocks(shape, placement, LAYOUT, rank):
            ranges = zip(block.offset, block.shape, strict=True)
            for place in itertools.product(*(range(at, at + size) for at, size in ranges)):
                seen[place] = seen.get(place, 0) + 1
    assert len(seen) == math.prod(shape)
    assert set(seen.values()) == {1}


def test_shapes_go_from_part_to_whole_and_back() -> None:
    """ep 2 and etp 2 halve experts and rows."""
    assert full_shape((2, 4, 5), EXPERT, LAYOUT) == (4, 8, 5)
    assert part_shape((4, 8, 5), EXPERT, LAYOUT) == (2, 4, 5)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((4, 8, 5), True), ((4, 6, 5), False), ((3, 8, 5), False), ((4,), False)],
    ids=["fits", "half a segment", "odd experts", "too flat"],
)
def test_a_cut_that_does_not_divide_is_told(shape: tuple[int, ...], fits: bool) -> None:
    """6 rows are two segments of 3, which etp 2 cannot halve."""
    assert tiles(shape, EXPERT, LAYOUT) is fits


def test_two_rectangles_share_their_intersection() -> None:
    """Rows 2-5 stored, rows 4-9 wanted at place 1 of a part: rows 4 and 5, at 2 and at 1."""
    stored, wanted = Block((2, 0), (0, 0), (4, 3)), Block((4, 1), (1, 0), (6, 2))
    assert overlap(stored, wanted) == ((2, 1), (1, 0), (2, 2))
    assert overlap(stored, Block((6, 0), (0, 0), (1, 3))) is None
