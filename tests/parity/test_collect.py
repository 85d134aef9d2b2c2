"""Shards are joined, replicas compared by bits, and owners named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from parity.collect import Replica, agree, assemble, owner
from parity.errors import ParityError
from parity.implementation import Placement, Shard
from parity.layout import Layout

REPLICATED = Placement("layernorm")
COLUMN = Placement("dense", (Shard("tp", 0),))
ROW = Placement("attention", (Shard("tp", 1),))
EXPERT = Placement("expert", (Shard("ep", 0), Shard("etp", 1)))
FUSED = Placement("expert", (Shard("ep", 0), Shard("etp", 1, segments=2)))


def numbered(*shape: int) -> Tensor:
    """Give a tensor whose entries are their own flat index."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def everywhere(pieces: Sequence[Tensor | None]) -> list[dict[str, Tensor | None]]:
    """Hand over one tensor `w`, one piece a rank, no memory shared."""
    return [{"w": None if piece is None else piece.clone()} for piece in pieces]


def test_a_replicated_tensor_is_the_first_ranks() -> None:
    """Without a cut every rank is a replica of every other."""
    full = numbered(3)
    result = assemble(Layout(4, tp=2), {"w": REPLICATED}, everywhere([full] * 4))
    assert torch.equal(result.filled["w"], full)
    assert result.replicas["w"] == Replica()


def test_tp_pieces_join_in_lane_order() -> None:
    """Ranks 0, 2 are lane 0 and ranks 1, 3 lane 1 at tp 2."""
    top, bottom = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    pieces = everywhere([top, bottom, top, bottom])
    rows = assemble(Layout(4, tp=2), {"w": COLUMN}, pieces)
    assert rows.filled["w"].tolist() == [[1, 2], [3, 4]]
    columns = assemble(Layout(4, tp=2), {"w": ROW}, pieces)
    assert columns.filled["w"].tolist() == [[1, 2, 3, 4]]


def test_experts_join_over_ep_and_etp() -> None:
    """At world 4, ep 2, etp 2 rank = 2 ep + etp: expert halves by rows."""
    pieces = [torch.tensor([[[float(rank)]]]) for rank in range(4)]
    result = assemble(Layout(4, tp=2, ep=2, etp=2), {"w": EXPERT}, everywhere(pieces))
    assert result.filled["w"].tolist() == [[[0], [1]], [[2], [3]]]


def test_a_fused_tensor_joins_block_by_block() -> None:
    """Gate rows 0..3 and up rows 4..7 cut over etp 2: rank 0 holds 0, 1, 4, 5."""
    pieces = [
        torch.tensor([0.0, 1.0, 4.0, 5.0]).reshape(1, 4, 1),
        torch.tensor([2.0, 3.0, 6.0, 7.0]).reshape(1, 4, 1),
    ]
    joined = assemble(Layout(2, etp=2), {"w": FUSED}, everywhere(pieces)).filled["w"]
    assert joined.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    plain = assemble(Layout(2, etp=2), {"w": EXPERT}, everywhere(pieces)).filled["w"]
    assert plain.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_a_dimension_cut_twice_nests_the_first_cut_outside() -> None:
    """Ep cuts 8 rows in halves, etp cuts each half again."""
    twice = Placement("expert", (Shard("ep", 0), Shard("etp", 0)))
    pieces = [torch.tensor([2.0 * rank, 2.0 * rank + 1]) for rank in range(4)]
    layout = Layout(4, ep=2, etp=2)
    joined = assemble(layout, {"w": twice}, everywhere(pieces)).filled["w"]
    assert joined.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [owner(layout, twice, (8,), (row,)) for row in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_replicas_are_compared_by_their_bits(dtype: torch.dtype) -> None:
    """Equal NaNs agree, and +0 differs from -0, in every dtype."""
    nan = torch.tensor([float("nan"), 0.0], dtype=dtype)
    layout = Layout(2)
    same = assemble(layout, {"w": REPLICATED}, everywhere([nan, nan]))
    assert same.replicas["w"].entries == 0
    signed = torch.tensor([float("nan"), -0.0], dtype=dtype)
    odd = assemble(layout, {"w": REPLICATED}, everywhere([nan, signed]))
    assert odd.replicas["w"].entries == 1
    assert odd.replicas["w"].ranks == (0, 1)
    assert odd.replicas["w"].index == (1,)


def test_the_pair_that_differs_most_is_named() -> None:
    """Rank 1 differs on one entry and rank 2 on two others: three entries, pair (0, 2)."""
    pieces = [numbered(5) for _ in range(4)]
    pieces[1][0] += 1
    pieces[2][3:] += 1
    replica = assemble(Layout(4), {"w": REPLICATED}, everywhere(pieces)).replicas["w"]
    assert (replica.entries, replica.ranks, replica.index) == (3, (0, 2), (3,))
    assert replica.classes == ((0, 3), (1,), (2,))
    assert replica.distance == pytest.approx((2 / 30) ** 0.5)


def test_a_differing_entry_is_given_in_the_full_tensor() -> None:
    """Row 1 of lane 1's block of 2 rows is row 3 of the tensor."""
    pieces = [numbered(2, 2) for _ in range(4)]
    pieces[3][1, 0] = -1.0
    replica = assemble(Layout(4, tp=2), {"w": COLUMN}, everywhere(pieces)).replicas["w"]
    assert (replica.entries, replica.ranks, replica.index) == (1, (1, 3), (3, 0))


def test_the_full_index_of_a_fused_tensor_counts_segments() -> None:
    """Row 2 of etp rank 1 is the first of its up rows: row 6 of 8."""
    pieces = [numbered(1, 4, 1) for _ in range(4)]
    pieces[3][0, 2, 0] = -1.0
    replica = assemble(Layout(4, etp=2), {"w": FUSED}, everywhere(pieces)).replicas["w"]
    assert (replica.ranks, replica.index) == ((1, 3), (0, 6, 0))
    assert owner(Layout(4, etp=2), FUSED, (1, 8, 1), (0, 6)) == 1


def test_none_everywhere_is_kept_as_none() -> None:
    """No rank has the gradient: nothing to fill, every rank is missing."""
    result = assemble(Layout(2), {"w": REPLICATED}, everywhere([None, None]))
    assert result.tensors["w"] is None
    assert "w" not in result.filled
    assert result.missing == {"w": (0, 1)}
    assert result.replicas["w"].entries == 0


def test_none_on_one_shard_is_reported_and_filled_with_zeros() -> None:
    """Ep rank 1 alone has None: the tensor is None, its filled form has zeros there."""
    pieces = everywhere([torch.ones(1, 2, 1), None])
    result = assemble(Layout(2, ep=2), {"w": EXPERT}, pieces)
    assert result.tensors["w"] is None
    assert result.missing == {"w": (1,)}
    assert result.filled["w"].flatten().tolist() == [1, 1, 0, 0]
    assert result.replicas["w"].entries == 0


def test_none_on_one_replica_differs_on_every_entry() -> None:
    """A replica without a gradient steps otherwise than one with it."""
    result = assemble(Layout(2), {"w": REPLICATED}, everywhere([numbered(3), None]))
    assert result.replicas["w"].entries == 3
    assert result.replicas["w"].distance == float("inf")


def test_a_stage_may_lack_a_name_but_not_a_single_rank() -> None:
    """With pp 2 ranks 2, 3 may hold nothing; rank 1 alone may not."""
    full = numbered(2)
    shards: list[dict[str, Tensor | None]] = [{"w": full}, {"w": full}, {}, {}]
    result = assemble(Layout(4, pp=2), {"w": REPLICATED}, shards)
    assert torch.equal(result.filled["w"], full)
    with pytest.raises(ParityError, match=r"w: not handed over by ranks \[1\]"):
        assemble(Layout(4, pp=2), {"w": REPLICATED}, [{"w": full}, {}, {}, {}])


@pytest.mark.parametrize(
    ("placement", "pieces", "message"),
    [
        (REPLICATED, [numbered(2), numbered(3)], r"rank 1 holds \(3,\)"),
        (REPLICATED, [numbered(2), numbered(2).double()], r"rank 1 holds .* torch.float64"),
        (REPLICATED, [numbered(2)], "shards of 1 ranks for a world of 2"),
        (ROW, [numbered(2), numbered(2)], "does not fit a piece"),
        (Placement("expert", (Shard("etp", 0, 2),)), [numbered(3)] * 2, "does not fit a piece"),
        (Placement("dense", (Shard("tp", 0), Shard("tp", 1))), [numbered(2, 2)] * 2, "cut twice"),
    ],
    ids=["shape", "dtype", "world", "dim", "segments", "axis"],
)
def test_pieces_that_do_not_fit_are_refused(
    placement: Placement, pieces: list[Tensor], message: str
) -> None:
    """The message names the tensor and what does not fit."""
    with pytest.raises(ParityError, match=message):
        assemble(Layout(2, tp=2), {"w": placement}, everywhere(pieces))


def test_a_name_without_placement_is_refused() -> None:
    """A tensor nobody declared cannot be rebuilt."""
    with pytest.raises(ParityError, match="rank 0: v has no placement"):
        assemble(Layout(1), {}, [{"v": numbered(1)}])


def test_ranks_must_agree_on_placements() -> None:
    """Two ranks with one view pass; with two views the name and both ranks are told."""
    assert agree([{"w": COLUMN}, {"w": COLUMN}]) == {"w": COLUMN}
    with pytest.raises(ParityError, match="w: ranks 0 and 2 disagree"):
        agree([{"w": COLUMN}, {"w": COLUMN}, {"w": ROW}])


@pytest.mark.parametrize(
    ("world", "tp", "ep", "etp"), [(4, 2, 4, 1), (8, 2, 2, 2), (6, 3, 2, 1), (12, 2, 3, 2)]
)
def test_every_owner_holds_its_entry(world: int, tp: int, ep: int, etp: int) -> None:
    """Mark the piece of each rank with the rank: each entry's mark is its owner's."""
    layout = Layout(world, tp=tp, ep=ep, etp=etp)
    pieces = [torch.full((2, 4, 3), float(rank)) for rank in range(world)]
    full = assemble(layout, {"w": FUSED}, everywhere(pieces)).filled["w"]
    assert full.shape == (2 * ep, 4 * etp, 3)
    for expert in range(full.shape[0]):
        for row in range(full.shape[1]):
            assert owner(layout, FUSED, full.shape, (expert, row)) == int(full[expert, row, 0])


def test_the_owner_of_a_replicated_entry_is_rank_zero() -> None:
    """Every rank holds it; the lowest one is named."""
    assert owner(Layout(4, tp=2), REPLICATED, (5,), (3,)) == 0
