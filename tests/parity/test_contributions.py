"""Shares, experts and token rows: what gradients are made of, on tensors made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity import contributions
from parity.contributions import compare_rows, match_experts

UNIT = 2.0**-53


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw a float64 normal tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_shares_are_found_and_given_only_where_they_fit() -> None:
    """2 a + 0 b + 1 c is found exactly; a millionth of something else is not hidden."""
    a, b, c, other = (draw(6, 8, seed=s) for s in range(4))
    fit = contributions.solve(2 * a + c, [a, b, c], UNIT)
    assert fit == pytest.approx([2.0, 0.0, 1.0], abs=1e-12)
    assert contributions.solve(2 * a + c + 1e-6 * other, [a, b, c], UNIT) is None


def test_shares_that_cannot_be_told_apart_are_not_guessed() -> None:
    """Equal columns, or too many of them, have no solution; a zero one counts as 1."""
    a, b = draw(4, 4), draw(4, 4, seed=1)
    assert contributions.solve(a, [a, 2 * a], UNIT) is None
    assert contributions.solve(a[:1], [draw(1, 4, seed=s) for s in range(3)], UNIT) is None
    assert contributions.solve(3 * b, [b, torch.zeros_like(b)], UNIT) == pytest.approx([3.0, 1.0])


def test_the_expert_whose_tensor_it_is() -> None:
    """A rolled stack is recognised, up to a factor; an idle expert is its own, noise nobody's."""
    expected = draw(5, 3, 4)
    expected[4] = 0.0
    actual = 2 * expected[[1, 2, 3, 0, 4]]
    assert match_experts(actual, expected, 1e-9) == [1, 2, 3, 0, 4]
    actual[0] = draw(3, 4, seed=7)
    assert match_experts(actual, expected, 1e-9) == [None, 2, 3, 0, 4]


def gradients(tokens: list[list[int]], seed: int = 0) -> Tensor:
    """Make weight gradients D^T X of experts that got the given tokens of a pool."""
    pool = draw(12, 20, seed=99)
    each = [draw(len(t), 16, seed=seed + e).T @ pool[t] for e, t in enumerate(tokens)]
    return torch.stack(each)


def test_token_rows_lost_and_moved_are_counted() -> None:
    """Whose tokens reached an expert is read off the span of its gradient's rows."""
    expected = gradients([[0, 1, 2], [3, 4], [5, 6, 7]])
    same = compare_rows(gradients([[0, 1, 2], [3, 4], [5, 6, 7]], 50), expected)
    assert same == {"lost": 0, "foreign": 0, "from": {}, "moved": []}
    lost = compare_rows(gradients([[0, 1], [3, 4], [5, 6, 7]], 50), expected)
    assert lost == {"lost": 1, "foreign": 0, "from": {}, "moved": []}
    shifted = compare_rows(gradients([[0, 1], [2, 3, 4], [5, 6, 7]], 50), expected)
    assert shifted == {"lost": 1, "foreign": 1, "from": {"1": 0}, "moved": []}
    moved = compare_rows(gradients([[3, 4], [0, 1, 2], [5, 6, 7]], 50), expected)
    assert moved == {"lost": 5, "foreign": 5, "from": {"0": 1, "1": 0}, "moved": [0, 1]}
    nobodys = compare_rows(gradients([[0, 1, 2, 11], [3, 4], [5, 6, 7]], 50), expected)
    assert nobodys == {"lost": 0, "foreign": 1, "from": {"0": -1}, "moved": []}


def test_full_spans_say_nothing() -> None:
    """As many tokens as the expert is wide: any token's row is in the span."""
    assert compare_rows(draw(2, 4, 6), draw(2, 4, 6, seed=1)) is None
