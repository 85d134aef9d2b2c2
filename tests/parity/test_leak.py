"""Precision leaks: what is round-off of a low dtype, and every near miss that is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from parity.compare import metrics
from parity.leak import leaked_dtype
from tests.parity.example_tensors import (
    BF16,
    F16,
    F32,
    Tensors,
    draw,
    judged,
    noisy,
)

Plant = Callable[[Tensors], None]


def shares(seed: int, count: int = 6) -> list[Tensors]:
    """Draw the gradient shares of several ranks."""
    return [draw(1000 * seed + index) for index in range(count)]


def total(parts: list[Tensors], low: torch.dtype | None = None, running: bool = False) -> Tensors:
    """Average shares in float64, or with each share (or every partial sum) rounded to `low`."""
    out = {}
    for name in parts[0]:
        each = [part[name] if low is None else part[name].to(low).double() for part in parts]
        value = each[0]
        for more in each[1:]:
            value = value + more
            if running and low is not None:
                value = value.to(low).double()
        out[name] = value / len(each)
    return out


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("running", [False, True], ids=["shares", "sums"])
@pytest.mark.parametrize(
    ("low", "name"), [(F32, "float32"), (BF16, "bfloat16"), (F16, "float16")],
    ids=["float32", "bfloat16", "float16"],
)  # fmt: skip
def test_a_downcast_reduction_is_a_leak(
    low: torch.dtype, name: str, running: bool, seed: int
) -> None:
    """Six shares reduced in a low dtype, averaged (by 6 = dp * gas) in float64: every row."""
    parts = shares(seed)
    rows = judged(total(parts, low, running), total(parts))
    assert {row.verdict for row in rows.values()} == {"leak"}
    assert {row.detail["leak"] for row in rows.values() if row.detail} == {name}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("roundoffs", [0.3, 6, 20])
def test_float32_activations_are_a_leak(roundoffs: float, seed: int) -> None:
    """Noise that is not per element but per matrix product is float32's too."""
    expected = draw(seed)
    rows = judged(noisy(expected, roundoffs, F32, seed + 50), expected)
    assert {row.verdict for row in rows.values()} == {"leak"}


@pytest.mark.parametrize("seed", range(3))
def test_the_true_float64_sum_is_no_leak(seed: int) -> None:
    """The near miss: another order of summation in float64 passes."""
    parts = shares(seed)
    rows = judged(total(parts[::-1]), total(parts))
    assert {row.verdict for row in rows.values()} == {"pass"}


def scaled(tensors: Tensors) -> None:
    """Scale by float32's round-off."""
    for name in tensors:
        tensors[name] = tensors[name] * (1 + 6e-8)


def scaled_much(tensors: Tensors) -> None:
    """Scale by a part in 200."""
    for name in tensors:
        tensors[name] = tensors[name] * 1.005


def lost_row(tensors: Tensors) -> None:
    """Lose the row with the smallest gradient, an error under 1e-2."""
    for name, tensor in tensors.items():
        rows = tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(-1, 1)
        rows[0] *= 1e-2
        tensors[name] = tensor.clone()
        (tensors[name].view_as(rows))[0] = 0.0


def one_entry(tensors: Tensors) -> None:
    """Alter one entry by little of the whole."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[3] += 3e-7 * float(tensor.norm())


def one_row(tensors: Tensors) -> None:
    """Alter one row by float32's round-off of the whole."""
    for name in ("q", "experts"):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1, 20)[2] *= 1 + 1e-6


def other_direction(tensors: Tensors) -> None:
    """Add another gradient a thousandth as large (an auxiliary loss a little off)."""
    other = draw(77)
    for name in tensors:
        tensors[name] = tensors[name] + 1e-3 * other[name]


def far_direction(tensors: Tensors) -> None:
    """Add another gradient a third as large."""
    other = draw(77)
    for name in tensors:
        tensors[name] = tensors[name] + 0.3 * other[name]


def between(tensors: Tensors) -> None:
    """Add another gradient of 1e-10, smaller than any low dtype's round-off."""
    other = draw(77)
    for name in tensors:
        tensors[name] = tensors[name] + 1e-10 * other[name]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "plant",
    [scaled, scaled_much, lost_row, one_entry, one_row, other_direction, far_direction, between],
    ids=lambda plant: plant.__name__,
)
def test_what_is_no_roundoff_fails_in_float64(plant: Plant, seed: int) -> None:
    """A pure scale, lost or altered rows, and other directions are failures at every size."""
    expected = draw(seed)
    actual = dict(expected)
    plant(actual)
    touched = [name for name in expected if actual[name] is not expected[name]]
    rows = judged(actual, expected)
    assert {rows[name].verdict for name in touched} == {"fail"}


@pytest.mark.parametrize("low", [F32, BF16])
def test_a_lost_row_under_a_leak_fails(low: torch.dtype) -> None:
    """What is left of the tensor is rounded, and the row is still gone."""
    expected = draw()
    expected["q"][4] *= 1e-2
    actual = {name: tensor.to(low).double() for name, tensor in expected.items()}
    actual["q"][4] = 0.0
    rows = judged(actual, expected)
    assert (rows["q"].verdict, rows["norm"].verdict) == ("fail", "leak")


def test_a_scale_under_a_leak_fails() -> None:
    """Rounding to bf16 and a factor 1.004: the scale is most of the error."""
    expected = draw()
    actual = {name: 1.004 * tensor.to(BF16).double() for name, tensor in expected.items()}
    assert {row.verdict for row in judged(actual, expected).values()} == {"fail"}


def test_only_float64_knows_leaks() -> None:
    """In float32 the same rounding to bf16 is a failure."""
    expected = draw()
    actual = {name: tensor.to(BF16).double() for name, tensor in expected.items()}
    assert {row.verdict for row in judged(actual, expected, F32).values()} == {"fail"}


def test_a_leak_is_at_most_one_percent() -> None:
    """The size limit stands before every other condition."""
    expected = draw()["q"]
    actual = expected.to(BF16).double()
    found = metrics(actual, expected)
    assert leaked_dtype(actual, expected, found) == "bfloat16"
    assert leaked_dtype(actual, expected, dataclasses.replace(found, error=1.1e-2)) is None
