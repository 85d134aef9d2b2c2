"""Every collective of the MoE layer against the algebra of its adjoint.

With x_p, y_p the input and the output gradient of rank p, F the forward and B the backward:

    sum_p <F(x)_p, y_p>  ==  k  *  sum_p <x_p, B(y)_p>

holds for all x and y where B is k**-1 times the exact adjoint. Where an activation is replicated
over lanes there is one x, not one per lane, and it counts once on the right-hand side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fold_impl import dispatch
from fold_impl.dispatch import (
    all_to_all,
    enter_routed,
    exchange,
    gather_equal,
    gather_rows,
    restore_combined,
    scatter_rows,
    scatter_share,
    share_bounds,
)
from fold_impl.groups import Group
from tests.worlds import alone, random, run_ranks, whole_world

H = 3
LINE = [(2, 7), (3, 7), (4, 5), (4, 1), (3, 0)]
"""(ranks, tokens): uneven, with empty shares (4 ranks and 5 tokens: 2 2 1 0), one and no token."""


class Pair(NamedTuple):
    """Forward and backward of one collective on one rank: x, F(x), y, B(y)."""

    x: Tensor
    forward: Tensor
    y: Tensor
    backward: Tensor


def pairs(
    world: int,
    rows: Callable[[int], int],
    apply: Callable[[Tensor, Group], Tensor],
    *,
    same_x: bool = False,
) -> list[Pair]:
    """Run a collective on every rank with its own rows of x and its own output gradient.

    Args:
        world: number of ranks.
        rows: rank -> rows of its x.
        apply: the collective.
        same_x: the activation is replicated: every rank the same x.
    """

    def work(runtime: object) -> Pair:
        group = whole_world(runtime)  # type: ignore[arg-type]
        seed = 1 if same_x else group.index + 1
        x = random(rows(group.index), H, seed=seed).requires_grad_()
        out = apply(x, group)
        y = random(*out.shape, seed=1000 + group.index)
        (gradient,) = torch.autograd.grad(out, x, y)
        return Pair(x.detach(), out.detach(), y, gradient)

    return run_ranks(world, work)


def outer(found: Sequence[Pair]) -> float:
    """Give sum_p <F(x)_p, y_p>."""
    return sum(float((p.forward * p.y).sum()) for p in found)


def inner(found: Sequence[Pair]) -> float:
    """Give sum_p <x_p, B(y)_p>."""
    return sum(float((p.x * p.backward).sum()) for p in found)


def close(actual: float, expected: float) -> bool:
    """Compare two inner products of a few dozen float64 products of size 1."""
    return abs(actual - expected) <= 1e-12 * max(1.0, abs(expected))


def chunk_rows(tokens: int, world: int, rank: int) -> int:
    """Give the rows of a lane's share, counted by hand: chunks of ceil(T / tp)."""
    chunk = -(-tokens // world)
    return max(0, min(chunk, tokens - rank * chunk))


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (8, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (7, [(0, 2), (2, 4), (4, 6), (6, 7)]),
        (5, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (1, [(0, 1), (1, 1), (1, 1), (1, 1)]),
        (0, [(0, 0)] * 4),
    ],
)
def test_shares_are_chunks_of_the_rounded_up_size(
    tokens: int, expected: list[tuple[int, int]]
) -> None:
    """Four lanes: the last ones may hold fewer rows or none, together they hold each row once."""
    lanes = [Group((0, 1, 2, 3), index, None) for index in range(4)]
    assert [share_bounds(tokens, lane) for lane in lanes] == expected


# ---------------------------------------------------------------- enter_routed: k = 1


@pytest.mark.parametrize(("world", "tokens"), LINE)
def test_enter_routed_gives_every_lane_the_mean_of_the_lanes_gradients(
    world: int, tokens: int
) -> None:
    """Forward identity; B(y)_p = (1/tp) sum_q y_q, the same bits on every lane."""
    found = pairs(world, lambda _: tokens, enter_routed)
    mean = torch.stack([p.y for p in found]).sum(0) / world
    for pair in found:
        assert torch.equal(pair.forward, pair.x)
        torch.testing.assert_close(pair.backward, mean, rtol=1e-14, atol=1e-14)
        assert torch.equal(pair.backward, found[0].backward)


@pytest.mark.parametrize(("world", "tokens"), LINE[:4])
def test_enter_routed_has_factor_one_on_a_replicated_input(world: int, tokens: int) -> None:
    """With x equal on the lanes sum_p <x, y_p> == sum_p <x, mean y>: k = 1; a SUM would be 1/tp."""
    found = pairs(world, lambda _: tokens, enter_routed, same_x=True)
    assert close(outer(found), inner(found))
    assert not close(outer(found), inner(found) * world)


def test_enter_routed_leaves_the_callers_gradient_as_it_is() -> None:
    """The all-reduce works on a copy: y, and what else reads it, keeps its value."""
    found = pairs(3, lambda _: 4, enter_routed)
    assert all(torch.equal(p.y, random(4, H, seed=1000 + i)) for i, p in enumerate(found))


# ---------------------------------------------------------------- restore_combined: k = 1


@pytest.mark.parametrize(("world", "tokens"), LINE)
def test_restore_gives_every_lane_the_shares_in_order(world: int, tokens: int) -> None:
    """All T rows, lane 0's first, without the padding of the short shares."""
    found = restored(world, tokens)
    for pair in found:
        assert torch.equal(pair.forward, torch.cat([p.x for p in found]))


@pytest.mark.parametrize(("world", "tokens"), LINE)
def test_restore_backward_is_the_exact_adjoint_also_of_lane_varying_gradients(
    world: int, tokens: int
) -> None:
    """sum_p <F x, y_p> == sum_p <x_p, B(y)_p>: k = 1, which is tp times the lane mean's."""
    found = restored(world, tokens)
    assert close(outer(found), inner(found))


def test_keeping_the_own_lanes_gradient_alone_is_not_the_adjoint() -> None:
    """The planted fault: rows of the own y only. Seen with lane-varying y, blind to equal ones."""
    found = restored(3, 7)
    bounds = [share_bounds(7, Group((0, 1, 2), p, None)) for p in range(3)]
    own = [p._replace(backward=p.y[slice(*b)]) for p, b in zip(found, bounds, strict=True)]
    assert not close(outer(own), inner(own))
    assert not close(outer(own), 3 * inner(own))
    y = found[0].y
    equal = [p._replace(y=y, backward=y[slice(*b)]) for p, b in zip(found, bounds, strict=True)]
    assert close(outer(equal), 3 * inner(equal))


def restored(world: int, tokens: int) -> list[Pair]:
    """Run `restore_combined` on shares of random rows."""
    return pairs(
        world,
        lambda rank: chunk_rows(tokens, world, rank),
        lambda x, group: restore_combined(x, tokens, group),
    )


# ---------------------------------------------------------------- scatter_share: k = tp


@pytest.mark.parametrize(("world", "tokens"), LINE)
def test_scatter_share_adds_the_lanes_and_keeps_the_own_rows(world: int, tokens: int) -> None:
    """Lane p has rows of sum_q x_q; together they are the whole sum."""
    found = pairs(world, lambda _: tokens, scatter_share)
    whole = torch.stack([p.x for p in found]).sum(0)
    assert [len(p.forward) for p in found] == [chunk_rows(tokens, world, r) for r in range(world)]
    torch.testing.assert_close(torch.cat([p.forward for p in found]), whole)


@pytest.mark.parametrize(("world", "tokens"), LINE[:4])
def test_scatter_share_backward_is_the_adjoint_over_tp(world: int, tokens: int) -> None:
    """sum_p <F x, y_p> == tp * sum_p <x_p, B(y)_p>; it undoes the factor of the restore."""
    found = pairs(world, lambda _: tokens, scatter_share)
    assert close(outer(found), world * inner(found))
    assert not close(outer(found), inner(found))


@pytest.mark.parametrize(("world", "tokens"), LINE[:4])
def test_scatter_share_under_restore_is_exact_for_the_lane_mean(world: int, tokens: int) -> None:
    """B_scatter(B_restore(y)) is the mean of the lanes' y on every lane, as the SKIP rule needs."""

    def apply(x: Tensor, group: Group) -> Tensor:
        return restore_combined(scatter_share(x, group), tokens, group)

    found = pairs(world, lambda _: tokens, apply)
    mean = torch.stack([p.y for p in found]).mean(0)
    for pair in found:
        torch.testing.assert_close(pair.backward, mean)


# ---------------------------------------------------------------- all_to_all: k = 1

UNEVEN = [[2, 0, 3], [0, 0, 0], [1, 4, 0]]
"""Row i: rows that rank i sends to ranks 0, 1, 2; rank 1 sends nothing."""


def travelled(backward_splits: bool = False) -> list[Pair]:
    """Send uneven rows; optionally with the adjoint's splits given wrongly, as the forward's."""

    def apply(x: Tensor, group: Group) -> Tensor:
        send = UNEVEN[group.index]
        receive = [UNEVEN[other][group.index] for other in range(3)]
        wrong = (send, send) if backward_splits else None
        return all_to_all(x, (send, receive), group, wrong)

    return pairs(3, lambda rank: sum(UNEVEN[rank]), apply)


def test_all_to_all_delivers_blocks_by_sender() -> None:
    """Rank 0 holds its own first two rows, nothing of rank 1, and rank 2's first row."""
    found = travelled()
    assert torch.equal(found[0].forward, torch.cat([found[0].x[:2], found[2].x[:1]]))
    assert torch.equal(found[1].forward, found[2].x[1:5])
    assert torch.equal(found[2].forward, found[0].x[2:5])


def test_all_to_all_backward_is_the_exact_adjoint_of_uneven_and_empty_rows() -> None:
    """k = 1: rows come back to where they were sent from."""
    found = travelled()
    assert close(outer(found), inner(found))
    assert torch.equal(found[0].backward[:2], found[0].y[:2])


def test_all_to_all_with_forward_splits_in_backward_is_not_the_adjoint() -> None:
    """The planted fault a2a-wrong-adjoint either breaks the exchange or moves wrong rows."""
    with pytest.raises(RuntimeError, match="size"):
        travelled(backward_splits=True)


# ---------------------------------------------------------------- gather_rows, scatter_rows: k = 1

SIZES = [[3, 1], [0, 4], [2, 0, 5], [0, 0]]
"""Rows each rank brings, with empty ones and with none at all."""


@pytest.mark.parametrize("sizes", SIZES)
def test_gather_rows_concatenates_uneven_rows_and_its_backward_is_the_adjoint(
    sizes: list[int],
) -> None:
    """Every rank gets all rows; gradients of all ranks add up on the owner: k = 1."""
    found = pairs(len(sizes), sizes.__getitem__, lambda x, group: gather_rows(x, sizes, group))
    everything = torch.cat([p.x for p in found])
    assert all(torch.equal(p.forward, everything) for p in found)
    assert close(outer(found), inner(found))


@pytest.mark.parametrize("sizes", SIZES)
def test_scatter_rows_adds_parts_and_its_backward_is_the_adjoint(sizes: list[int]) -> None:
    """Rank r gets its rows of the sum of all ranks' parts; backward gathers: k = 1."""
    found = pairs(len(sizes), lambda _: sum(sizes), lambda x, group: scatter_rows(x, sizes, group))
    whole = torch.stack([p.x for p in found]).sum(0)
    for pair, expected in zip(found, whole.split(sizes), strict=True):
        torch.testing.assert_close(pair.forward, expected)
    assert close(outer(found), inner(found))


def test_gather_then_scatter_multiplies_by_the_number_of_slices() -> None:
    """Each slice adds its part: with the identity for an expert the result is etp times x."""
    sizes = [2, 0, 3]

    def apply(x: Tensor, group: Group) -> Tensor:
        return scatter_rows(gather_rows(x, sizes, group), sizes, group)

    for pair in pairs(3, sizes.__getitem__, apply):
        torch.testing.assert_close(pair.forward, 3 * pair.x)
        torch.testing.assert_close(pair.backward, 3 * pair.y)


# ---------------------------------------------------------------- without a gradient, alone


def test_exchange_and_gather_equal_move_counts() -> None:
    """Rank i sends 10 i + j to rank j; a gather puts blocks in rank order."""

    def work(runtime: object) -> tuple[list[int], list[int]]:
        group = whole_world(runtime)  # type: ignore[arg-type]
        counts = torch.tensor([10 * group.index + j for j in range(3)])
        got = exchange(counts, [1, 1, 1], [1, 1, 1], group)
        return got.tolist(), gather_equal(counts[:1], group).tolist()

    found = run_ranks(3, work)
    assert found[1] == ([1, 11, 21], [0, 10, 20])
    assert found[2] == ([2, 12, 22], [0, 10, 20])


def test_a_rank_alone_passes_every_tensor_through() -> None:
    """Without a communicator all of them are the identity, of the same object."""
    tp, x = alone().tp, random(4, H, seed=0)
    assert enter_routed(x, tp) is x
    assert restore_combined(x, 4, tp) is x
    assert scatter_share(x, tp) is x
    assert all_to_all(x, ([4], [4]), tp) is x
    assert gather_rows(x, [4], tp) is x
    assert scatter_rows(x, [4], tp) is x
    assert exchange(x, [4], [4], tp) is x
    assert gather_equal(x, tp) is x


# ---------------------------------------------------------------- what is handed in


def test_the_input_boundary_leaves_a_shared_gradient_alone() -> None:
    """`w + enter(x)`: autograd hands one and the same tensor to both, and w's is not reduced."""

    def work(runtime: object) -> tuple[Tensor, Tensor]:
        group = whole_world(runtime)  # type: ignore[arg-type]
        w, x = (random(2, H, seed=s).requires_grad_() for s in (1, 2))
        y = random(2, H, seed=10 + group.index)
        of_w, of_x = torch.autograd.grad(w + enter_routed(x, group), (w, x), y)
        return of_w, of_x

    found = run_ranks(3, work)
    mine = [random(2, H, seed=10 + rank) for rank in range(3)]
    for (of_w, of_x), y in zip(found, mine, strict=True):
        assert torch.equal(of_w, y)
        assert torch.allclose(of_x, sum(mine) / 3)  # type: ignore[arg-type]


def strict(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what NCCL and Gloo refuse, or read in the order of memory; threads copy by index."""

    def checked(*arguments: Any, **options: Any) -> Any:
        assert all(t.is_contiguous() for t in arguments if isinstance(t, Tensor))
        return collective(*arguments, **options)

    return checked


def test_rows_need_not_be_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed view travels as its copy does, through every collective, there and back."""
    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(dispatch, name, strict(getattr(dispatch, name)))
    for name in ("all_to_all_single", "all_reduce"):
        monkeypatch.setattr(dist, name, strict(getattr(dist, name)))

    def work(runtime: object) -> list[tuple[Tensor, Tensor]]:
        group = whole_world(runtime)  # type: ignore[arg-type]
        x = random(H, 4, seed=group.index).t()
        splits = [1, 3], [1, 1] if group.index == 0 else [3, 3]
        calls: list[Callable[[Tensor], Tensor]] = [
            lambda t: exchange(t, *splits, group),
            lambda t: gather_equal(t, group),
            lambda t: gather_rows(t, [4, 4], group),
            lambda t: scatter_rows(t, [2, 2], group),
            lambda t: restore_combined(t, 8, group),
            lambda t: scatter_share(t, group),
            lambda t: torch.autograd.grad(enter_routed(w, group), w, t)[0],
        ]
        w = random(4, H, seed=3).requires_grad_()
        return [(call(x), call(x.contiguous())) for call in calls]

    for rank in run_ranks(2, work):
        for view, copy in rank:
            assert torch.equal(view, copy)
