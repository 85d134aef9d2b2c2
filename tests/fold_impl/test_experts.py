"""The arithmetic of the routed experts, by hand and against one expert at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fold_impl.experts import ExpertNames, RoutedExperts
from tests.worlds import random

L, F, H = 3, 2, 4
NAMES = ExpertNames("w1", "w3", "w2")


def experts(names: ExpertNames = NAMES) -> RoutedExperts:
    """Make experts with random float64 weights, the same whether gate and up are fused or not."""
    gate, up, down = random(L, F, H, seed=1), random(L, F, H, seed=2), random(L, H, F, seed=3)
    if names.up is None:
        table = {names.gate: torch.cat([gate, up], dim=1), names.down: down}
    else:
        table = {names.gate: gate, names.up: up, names.down: down}
    return RoutedExperts(names, {name: nn.Parameter(weight) for name, weight in table.items()})


def one_expert(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Apply one SwiGLU expert to one row as the formula says."""
    g, u = gate @ x, up @ x
    return down @ (g / (1 + torch.exp(-g)) * u)


def test_one_expert_of_width_one_by_hand() -> None:
    """w1 = 1, w3 = 2, w2 = 3, x = 1: 3 * silu(1) * 2 = 6 / (1 + e^-1)."""
    table = {"w1": 1.0, "w3": 2.0, "w2": 3.0}
    module = RoutedExperts(
        NAMES,
        {n: nn.Parameter(torch.full((1, 1, 1), w, dtype=torch.float64)) for n, w in table.items()},
    )
    y = module(torch.ones(1, 1, dtype=torch.float64), [1])
    assert float(y.detach()) == pytest.approx(6 / (1 + math.exp(-1)), rel=1e-14)


@pytest.mark.parametrize("counts", [[2, 3, 1], [0, 4, 2], [6, 0, 0], [0, 0, 0]])
def test_each_expert_takes_its_consecutive_rows(counts: list[int]) -> None:
    """Rows are sorted by expert; experts without rows are passed over."""
    module = experts()
    x = random(sum(counts), H, seed=4)
    of_row = [e for e, n in enumerate(counts) for _ in range(n)]
    expected = [
        one_expert(row, module.w1[e], module.w3[e], module.w2[e])  # type: ignore[index]
        for row, e in zip(x, of_row, strict=True)
    ]
    y = module(x, counts)
    assert y.shape == (sum(counts), H)
    if expected:
        torch.testing.assert_close(y, torch.stack(expected))


def test_a_fused_gate_up_weight_holds_the_gate_rows_first() -> None:
    """One (L, 2F, H) parameter gives what two of (L, F, H) give; swapped halves do not."""
    x, counts = random(5, H, seed=4), [2, 1, 2]
    fused = experts(ExpertNames("gate_up_proj", None, "down_proj"))
    assert torch.equal(fused(x, counts), experts()(x, counts))
    with torch.no_grad():
        weight = fused.get_parameter("gate_up_proj")
        weight.copy_(weight.roll(F, dims=1))
    assert not torch.allclose(fused(x, counts), experts()(x, counts))


@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0, 0]])
def test_an_expert_without_rows_has_a_zero_gradient_not_none(counts: list[int]) -> None:
    """Also where no expert has any row: the optimizer must not skip momentum and decay."""
    module = experts()
    module(random(sum(counts), H, seed=4), counts).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        alive = [bool(g.any()) for g in parameter.grad]
        assert alive == [n > 0 for n in counts]


def test_parameters_keep_the_names_of_the_module_they_replace() -> None:
    """Checkpoints and comparisons speak in those names."""
    assert [n for n, _ in experts().named_parameters()] == ["w1", "w3", "w2"]
    fused = experts(ExpertNames("gate_up_proj", None, "down_proj"))
    assert [n for n, _ in fused.named_parameters()] == ["gate_up_proj", "down_proj"]


def test_a_row_too_many_is_not_passed_over_silently() -> None:
    """Counts that do not add up to the rows are an error."""
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        experts()(random(4, H, seed=4), [1, 1, 1])
