"""The dense path over TP lanes: two collectives, their adjoints, linears against nn.Linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import linear

from fold_impl.convert import cut
from fold_impl.families import Shard
from fold_impl.groups import Group
from fold_impl.points import Points
from fold_impl.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedTailLinear,
    enter_lanes,
    enter_region,
    leave_lanes,
)
from tests.worlds import alone, random, run_ranks, whole_world

TP = 3
ROWS, IN, WIDTH, OUT = 5, 4, 6, 2


def moved(collective: Any, same_x: bool, same_y: bool) -> list[tuple[Tensor, ...]]:
    """Run a collective on TP lanes: (x, F(x), y, B(y)) of each."""

    def work(runtime: Any) -> tuple[Tensor, ...]:
        group = whole_world(runtime)
        x = random(ROWS, IN, seed=1 if same_x else group.index + 1).requires_grad_()
        y = random(ROWS, IN, seed=9 if same_y else group.index + 10)
        out = collective(x, group)
        return x.detach(), out.detach(), y, torch.autograd.grad(out, x, y)[0]

    return run_ranks(TP, work)


def products(found: list[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Give sum_p <F(x)_p, y_p> and sum_p <x_p, B(y)_p>."""
    left = sum(float((f * y).sum()) for _, f, y, _ in found)
    return left, sum(float((x * b).sum()) for x, _, _, b in found)


def test_enter_lanes_is_the_identity_whose_adjoint_adds_the_lanes_up() -> None:
    """B(y)_p = sum_q y_q; on a replicated x sum <x, y_p> == 1/tp * sum_p <x, B(y)>: k = 1/tp."""
    found = moved(enter_lanes, same_x=True, same_y=False)
    whole = torch.stack([y for _, _, y, _ in found]).sum(0)
    for x, forward, _, backward in found:
        assert torch.equal(forward, x)
        torch.testing.assert_close(backward, whole)
    left, right = products(found)
    assert left == pytest.approx(right / TP, rel=1e-13)


def test_leave_lanes_adds_the_lanes_up_with_the_identity_as_adjoint() -> None:
    """With y equal on the lanes sum <F x, y> == tp * sum_p <x_p, y>: k = tp, the lane mean's."""
    found = moved(leave_lanes, same_x=False, same_y=True)
    whole = torch.stack([x for x, _, _, _ in found]).sum(0)
    for _, forward, y, backward in found:
        torch.testing.assert_close(forward, whole)
        assert torch.equal(backward, y)
    left, right = products(found)
    assert left == pytest.approx(TP * right, rel=1e-13)


def test_enter_and_leave_do_not_touch_the_callers_tensors() -> None:
    """Both all-reduce a copy: x and y keep their values."""
    for collective in (enter_lanes, leave_lanes):
        for rank, (x, _, y, _) in enumerate(moved(collective, same_x=False, same_y=False)):
            assert torch.equal(x, random(ROWS, IN, seed=rank + 1))
            assert torch.equal(y, random(ROWS, IN, seed=rank + 10))


def test_a_lane_alone_passes_through() -> None:
    """Without a communicator both are the identity."""
    x, tp = random(ROWS, IN, seed=1), alone().tp
    assert enter_lanes(x, tp) is x
    assert leave_lanes(x, tp) is x


# ---------------------------------------------------------------- linears


def weights() -> dict[str, Tensor]:
    """Draw the weights of IN -> WIDTH -> OUT with biases."""
    shapes = {"w": (WIDTH, IN), "b": (WIDTH,), "v": (OUT, WIDTH), "c": (OUT,)}
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


X, Y = random(ROWS, IN, seed=20), random(ROWS, OUT, seed=21)


def dense() -> tuple[Tensor, dict[str, Tensor]]:
    """Compute output and gradients of the pair of linears in one process."""
    leaves = {"x": X, **weights()}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    hidden = torch.tanh(linear(leaves["x"], leaves["w"], leaves["b"]))
    out = linear(hidden, leaves["v"], leaves["c"])
    gradients = torch.autograd.grad(out, list(leaves.values()), Y)
    return out.detach(), dict(zip(leaves, gradients, strict=True))


def lanes(points: Points | None = None, *, region: bool = False) -> list[dict[str, Any]]:
    """Run column-, then row-parallel linear on TP lanes; output and gradients of each."""

    def work(runtime: Any) -> dict[str, Any]:
        tp = whole_world(runtime)
        pair = parallel_pair(tp, points or Points(), region)
        x = X.clone().requires_grad_()
        out = pair(x)
        named = {"x": x, **dict(pair.named_parameters())}
        gradients = torch.autograd.grad(out, list(named.values()), Y)
        return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}

    return run_ranks(TP, work)


def parallel_pair(tp: Group, points: Points, region: bool) -> nn.Sequential:
    """Cut the weights for one lane."""
    full = weights()

    def part(name: str, dim: int) -> nn.Parameter:
        return nn.Parameter(cut(full[name], Shard("tp", dim), tp, name).clone())

    pair = nn.Sequential(
        ColumnParallelLinear(part("w", 0), part("b", 0), tp, enters=not region),
        nn.Tanh(),
        RowParallelLinear(part("v", 1), nn.Parameter(full["c"]), tp, points),
    )
    if region:
        enter_region(pair, tp)
    return pair


@pytest.mark.parametrize("region", [False, True])
def test_column_and_row_parallel_linears_are_the_dense_pair(region: bool) -> None:
    """Same output and input gradient on every lane; sharded gradients are slices; SKIP holds."""
    out, expected = dense()
    for rank, found in enumerate(lanes(region=region)):
        torch.testing.assert_close(found["out"], out)
        torch.testing.assert_close(found["x"], expected["x"])
        rows = slice(rank * WIDTH // TP, (rank + 1) * WIDTH // TP)
        torch.testing.assert_close(found["0.weight"], expected["w"][rows])
        torch.testing.assert_close(found["0.bias"], expected["b"][rows])
        torch.testing.assert_close(found["2.weight"], expected["v"][:, rows])
        torch.testing.assert_close(found["2.bias"], expected["c"])


def test_the_replicated_bias_is_added_once_unless_planted_otherwise() -> None:
    """Fault bias-times-tp: added on every lane before the sum it would count tp times."""
    points = Points()
    points.plant("linear.bias", lambda bias, tp_size: bias * tp_size)
    out, bias = dense()[0], weights()["c"]
    for found in lanes(points):
        torch.testing.assert_close(found["out"], out + (TP - 1) * bias)


def test_a_region_of_many_linears_enters_the_lanes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three column-parallel linears of one input: one all-reduce in backward, not three."""

    class Three(nn.Module):
        def __init__(self, tp: Group, *, enters: bool) -> None:
            super().__init__()
            self.linears = nn.ModuleList(
                ColumnParallelLinear(nn.Parameter(random(2, IN, seed=i)), None, tp, enters=enters)
                for i in range(3)
            )

        def forward(self, hidden_states: Tensor) -> Tensor:
            return torch.stack([part(hidden_states) for part in self.linears])

    reduced: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, group: Any = None) -> Any:
        reduced.append(tensor.numel())
        return original(tensor, group=group)

    def work(runtime: Any) -> list[Tensor]:
        tp, gradients = whole_world(runtime), []
        for module in (Three(tp, enters=True), Three(tp, enters=False)):
            if not module.linears[0].enters:
                enter_region(module, tp)
            for by_name in (False, True):
                x = X.clone().requires_grad_()
                out = module(hidden_states=x) if by_name else module(x)
                gradients.append(torch.autograd.grad(out.sum(), x)[0])
        return gradients

    monkeypatch.setattr(dist, "all_reduce", counted)
    for found in run_ranks(TP, work):
        for gradient in found[1:]:
            torch.testing.assert_close(gradient, found[0])
    assert len(reduced) == TP * (3 + 3 + 1 + 1)


# ---------------------------------------------------------------- a tail that all heads share

TAIL = 2


def latent(tp: Group, *, tail: int) -> nn.ModuleDict:
    """Cut the weights of one lane: down projection, up projection to the heads, output."""
    full = {
        "a": random(3 + TAIL, IN, seed=1),
        "up": random(6, 3, seed=2),
        "o": random(OUT, 6, seed=3),
    }
    up = nn.Parameter(cut(full["up"], Shard("tp", 0), tp, "up").clone())
    out = nn.Parameter(cut(full["o"], Shard("tp", 1), tp, "o").clone())
    return nn.ModuleDict(
        {
            "a": SharedTailLinear(nn.Parameter(full["a"]), None, tail, tp),
            "up": ColumnParallelLinear(up, None, tp, enters=True),
            "o": RowParallelLinear(out, None, tp, Points()),
        }
    )


def attended(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    """Let every head of width 2 meet the one rotary key of width 2, as latent attention does."""
    compressed, key = parts["a"](x).split([3, TAIL], dim=-1)
    heads = parts["up"](compressed).unflatten(-1, (-1, TAIL))
    y: Tensor = parts["o"]((heads * torch.tanh(heads * key.unsqueeze(-2))).flatten(-2))
    return y


def tail_gradients(tail: int) -> tuple[list[Tensor], Tensor]:
    """Give the gradient of the shared down projection on every lane, and the true one."""

    def work(runtime: Any) -> Tensor:
        parts = latent(whole_world(runtime), tail=tail)
        attended(parts, X).backward(Y)
        gradient = parts["a"].get_parameter("weight").grad
        assert gradient is not None
        return gradient

    alone_parts = latent(alone().tp, tail=tail)
    attended(alone_parts, X).backward(Y)
    true = alone_parts["a"].get_parameter("weight").grad
    assert true is not None
    return run_ranks(TP, work), true


def test_a_shared_tail_has_the_whole_gradient_on_every_lane() -> None:
    """Its columns feed each lane's heads directly: their gradients add up, the others' have."""
    gradients, true = tail_gradients(TAIL)
    for gradient in gradients:
        torch.testing.assert_close(gradient, true)


def test_a_tail_cut_too_short_loses_the_other_lanes_heads() -> None:
    """The near miss: with one column of two the last row but one is a lane's own part."""
    gradients, true = tail_gradients(TAIL - 1)
    for gradient in gradients:
        torch.testing.assert_close(gradient[-1], true[-1])
        assert not torch.allclose(gradient[-2], true[-2])
