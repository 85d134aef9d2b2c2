"""Metrics, thresholds and verdicts: every rule has a fault that trips it and a near miss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.case import Optimizer
from parity.collect import Assembled, assemble
from parity.compare import (
    FACTOR,
    UNIT_ROUNDOFF,
    OptimizerStep,
    RowContext,
    grad_norm_rows,
    gradient_rows,
    leaked_dtype,
    loss_rows,
    metrics,
    norm,
    replica_rows,
    routing_rows,
    threshold,
    update_rows,
)
from parity.errors import ParityError
from parity.implementation import Placement, Shard
from parity.layout import Layout
from parity.optimizers import ReferenceOptimizer
from parity.store import Row

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LAYOUT = Layout(4, tp=2, ep=2)
PLACEMENTS = {
    "experts": Placement("expert", (Shard("ep", 0),)),
    "q": Placement("attention", (Shard("tp", 0),)),
    "norm": Placement("layernorm"),
    "norm2": Placement("layernorm"),
    "router": Placement("router"),
}
SHAPES = {"experts": (4, 12, 20), "q": (24, 20), "norm": (48,), "norm2": (48,), "router": (4, 48)}
Tensors = dict[str, Tensor]
Plant = Callable[[Tensors], None]


def context(dtype: torch.dtype = F64, **changes: Any) -> RowContext:
    """Give the context every row of these tests shares."""
    shape = {"world": 4, "pp": 1, "tp": 2, "dp": 2, "ep": 2, "etp": 1, "edp": 2}
    engine = {"name": "native", "gas": 3, "backend": "gloo"}
    base = RowContext("case", "ours", shape, engine, "reference", 1, dtype, 0.5)
    return dataclasses.replace(base, **changes)


def draw(seed: int = 0, size: float = 1.0) -> Tensors:
    """Draw one float64 tensor per name; the last expert is idle."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: size * torch.randn(shape, generator=generator, dtype=F64)
        for name, shape in SHAPES.items()
    }
    tensors["experts"][-1] = 0.0
    return tensors


def given(tensors: Mapping[str, Tensor | None]) -> Assembled:
    """Assemble as if one rank had handed over the full tensors."""
    return assemble(Layout(1), {name: PLACEMENTS[name] for name in tensors}, [tensors])


def noisy(tensors: Tensors, roundoffs: float, dtype: torch.dtype, seed: int = 9) -> Tensors:
    """Add noise of the given relative norm, in u, to every expert and to every other tensor."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=F64)
        dims = tuple(range(1, tensor.dim())) if name == "experts" else None
        size = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
        noise *= size / torch.linalg.vector_norm(noise, dim=dims, keepdim=True)
        out[name] = tensor + roundoffs * UNIT_ROUNDOFF[dtype] * noise
    return out


def judged(
    actual: Mapping[str, Tensor | None],
    expected: Tensors,
    dtype: torch.dtype = F64,
    structural_zero: frozenset[str] = frozenset(),
) -> dict[str, Row]:
    """Judge gradients; rows by tensor."""
    rows = gradient_rows(
        context(dtype), given(actual), expected, PLACEMENTS, LAYOUT, structural_zero
    )
    for row in rows:
        row.to_json()
    return {str(row.tensor): row for row in rows}


# ---------------------------------------------------------------- metrics


def test_metrics_by_hand() -> None:
    """g0 = (3, 4), g1 = (6, 8.5): <d, g0> = 27 of 25, d = (3, 4.5)."""
    found = metrics(torch.tensor([6.0, 8.5], dtype=F64), torch.tensor([3.0, 4.0], dtype=F64))
    assert found.ratio == pytest.approx(math.hypot(6, 8.5) / 5, rel=1e-15)
    assert found.scale == pytest.approx(1 + 27 / 25, rel=1e-15)
    assert found.residual == pytest.approx(math.hypot(6 - 6.24, 8.5 - 8.32) / 5, rel=1e-14)
    assert found.error == pytest.approx(math.hypot(3, 4.5) / 5, rel=1e-15)
    assert found.worst_index == (1,)


def test_equal_tensors_have_scale_one_and_no_worst() -> None:
    """Nothing differs, so nothing is worst."""
    tensor = draw()["q"]
    found = metrics(tensor, tensor.clone())
    assert (found.ratio, found.scale, found.residual, found.error) == (1.0, 1.0, 0.0, 0.0)
    assert found.worst_index is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("excess", [1e-12, -1e-9, 1e-3, 3.0])
def test_a_pure_scale_has_its_excess_to_full_precision(excess: float, seed: int) -> None:
    """Scale - 1 is found to rounding of the entries, and the residual is only that rounding."""
    expected = draw(seed)["q"]
    found = metrics(expected * (1 + excess), expected)
    excess = (1 + excess) - 1  # what the factor really is in float64
    assert found.excess == pytest.approx(excess, abs=4e-17 * (1 + abs(excess)), rel=1e-15)
    assert found.residual is not None
    assert found.residual < 2e-16 * (1 + abs(excess))


@pytest.mark.parametrize("exponent", [-1060, -600, -300, 0, 300, 600, 1000])
def test_metrics_survive_extreme_magnitudes(exponent: int) -> None:
    """Squares of these entries over- or underflow; the metrics are those of ordinary ones."""
    base = torch.tensor([8.0, 16.0, 32.0, 64.0], dtype=F64)
    power = torch.tensor(exponent // 2, dtype=F64).exp2(), torch.tensor(
        exponent - exponent // 2, dtype=F64
    ).exp2()
    expected = base * power[0] * power[1]
    actual = expected.clone()
    actual[2] *= 2
    plain = metrics(torch.tensor([8.0, 16.0, 64.0, 64.0], dtype=F64), base)
    assert metrics(actual, expected) == plain


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["actual", "expected"])
def test_what_is_not_finite_has_no_metrics_but_a_place(bad: float, side: str) -> None:
    """All metrics are None; the first such entry is the worst."""
    clean, broken = draw()["q"], draw()["q"]
    broken[7, 3] = bad
    broken[8, 0] = bad
    pair = (broken, clean) if side == "actual" else (clean, broken)
    found = metrics(*pair)
    assert (found.ratio, found.scale, found.residual, found.error) == (None, None, None, None)
    assert found.worst_index == (7, 3)


def test_an_overflowing_quotient_is_not_finite() -> None:
    """1e300 against 1e-300 has no float ratio: None, never inf."""
    found = metrics(torch.full((2,), 1e300, dtype=F64), torch.full((2,), 1e-300, dtype=F64))
    assert found.error is None


def test_zero_expected_divides_by_the_family() -> None:
    """|g1| = 5 in a family of norm 100 is an error of 0.05; other metrics are null."""
    actual, zero = torch.tensor([3.0, 4.0], dtype=F64), torch.zeros(2, dtype=F64)
    found = metrics(actual, zero, family_norm=100.0)
    assert (found.ratio, found.scale, found.residual, found.error) == (None, None, None, 0.05)
    assert metrics(zero, zero, family_norm=100.0).error == 0.0
    assert metrics(zero, zero).error == 0.0
    assert metrics(actual, zero).error is None
    tiny = metrics(actual * 1e-250, zero, family_norm=1e-248)
    assert tiny.error == pytest.approx(0.05, rel=1e-14)


def test_every_expert_is_measured_alone() -> None:
    """Expert 1 (norm 2) is off by 1, expert 2 (norm 1) by 1, idle expert 3 by 0.5 of norm 10."""
    expected = torch.zeros(4, 2, 2, dtype=F64)
    expected[0, 0, 0], expected[1, 0, 1], expected[2, 1, 0] = 9.0, 2.0, 1.0
    actual = expected.clone()
    actual[1, 1, 1], actual[2, 1, 0], actual[3, 0, 0] = 1.0, 2.0, 0.5
    found = metrics(actual, expected, family_norm=10.0, experts=True)
    assert found.expert_errors is not None
    assert found.expert_errors.tolist() == [0.0, 0.5, 1.0, 0.05]
    assert (found.expert, found.worst_index) == (2, (2, 1, 0))


def test_shapes_must_agree() -> None:
    """A broadcast would compare nonsense."""
    with pytest.raises(ParityError, match="shape"):
        metrics(torch.zeros(2), torch.zeros(2, 1))


@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
def test_the_norm_of_all_tensors(size: float) -> None:
    """3, 4 and 12 have norm 13, at any magnitude."""
    tensors = [size * torch.tensor([3.0, 4.0], dtype=F64), size * torch.tensor([12.0], dtype=F64)]
    assert norm(tensors) == pytest.approx(13 * size, rel=1e-15)


# ---------------------------------------------------------------- gradient


def test_thresholds_are_64_roundoffs() -> None:
    """7.1e-15 in float64 and 3.8e-6 in float32, the scale's limits in 16 bits."""
    assert threshold(F64) == pytest.approx(7.1e-15, rel=1e-2)
    assert threshold(F32) == pytest.approx(3.8e-6, rel=1e-2)
    assert (threshold(BF16), threshold(F16)) == (2e-2, 3e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [F64, F32])
def test_benign_noise_passes(dtype: torch.dtype, seed: int) -> None:
    """Noise of 6 u, and still of 40 u, is no mismatch, on no expert."""
    expected = draw(seed)
    for roundoffs in (6, 40):
        rows = judged(noisy(expected, roundoffs, dtype, seed + 100), expected, dtype)
        assert {row.verdict for row in rows.values()} == {"pass"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "factor"), [(F64, 1e-12), (F32, 5e-6), (F64, -1e-10)])
def test_a_small_scale_fails_on_top_of_noise(dtype: torch.dtype, factor: float, seed: int) -> None:
    """The smallest factors promised are failures in every family, never leaks."""
    expected = draw(seed)
    actual = {n: t * (1 + factor) for n, t in noisy(expected, 6, dtype, seed).items()}
    rows = judged(actual, expected, dtype)
    assert {row.verdict for row in rows.values()} == {"fail"}


def test_a_scale_within_roundoff_passes() -> None:
    """The near miss of the rule above: 32 u."""
    expected = draw()
    actual = {n: t * (1 + 32 * UNIT_ROUNDOFF[F32]) for n, t in expected.items()}
    assert {row.verdict for row in judged(actual, expected, F32).values()} == {"pass"}


def test_permuted_experts_have_ratio_one_and_fail() -> None:
    """Experts 0 and 1 swapped: |g1| = |g0| to the last bit but two, error near 1."""
    expected = draw()
    expected["experts"] /= torch.linalg.vector_norm(
        expected["experts"], dim=(1, 2), keepdim=True
    ).clamp_min(1e-9)
    actual = dict(expected, experts=expected["experts"][[1, 0, 2, 3]])
    row = judged(actual, expected)["experts"]
    assert row.ratio == pytest.approx(1.0, abs=1e-12)
    assert row.verdict == "fail"
    assert row.error is not None
    assert row.error > 0.5


def test_one_small_expert_cannot_hide_in_its_tensor() -> None:
    """An expert 1e-8 of the others, doubled, is 1e-8 of the tensor: float32 fails it alone."""
    expected = draw()
    expected["experts"][1] *= 1e-8
    actual = dict(expected, experts=expected["experts"].clone())
    actual["experts"][1] *= 2
    row = judged(actual, expected, F32)["experts"]
    assert row.error is not None
    assert row.error < threshold(F32)
    assert row.verdict == "fail"
    assert row.reason is not None
    assert "expert 1 alone" in row.reason
    assert row.detail is not None
    assert row.detail["expert_scales"][:3] == pytest.approx([1, 2, 1])
    assert row.detail["expert_scales"][3] is None
    benign = dict(expected, experts=expected["experts"].clone())
    benign["experts"][1] *= 1 + 2e-6
    assert judged(benign, expected, F32)["experts"].verdict == "pass"


def test_worst_names_rank_expert_and_row() -> None:
    """Expert 2 is ep rank 1, first held by rank 1; row 13 of q is lane 1 of tp 2."""
    expected = draw()
    actual = {name: tensor.clone() for name, tensor in expected.items()}
    actual["experts"][2, 5, 3] += 1e-3
    actual["q"][13, 2] += 1e-3
    actual["norm"][40] += 1e-3
    rows = judged(actual, expected)
    assert rows["experts"].worst == {"rank": 1, "expert": 2, "row": 5}
    assert rows["q"].worst == {"rank": 1, "expert": None, "row": 13}
    assert rows["norm"].worst == {"rank": 0, "expert": None, "row": 40}
    assert rows["router"].worst is None


def test_an_idle_expert_must_stay_zero() -> None:
    """A gradient of 1e-4 of the family on the idle expert fails; 1e-7 is float32 noise."""
    expected = draw()
    for size, verdict in ((1e-4, "fail"), (1e-7, "pass")):
        actual = dict(expected, experts=expected["experts"].clone())
        actual["experts"][3, 0, 0] = size * float(expected["experts"].norm())
        assert judged(actual, expected, F32)["experts"].verdict == verdict


def test_none_fails_where_zero_passes() -> None:
    """A zero-token expert has a zero gradient, not None."""
    expected = draw()
    actual: dict[str, Tensor | None] = dict(expected)
    actual["experts"] = None
    rows = judged(actual, expected)
    assert rows["experts"].verdict == "fail"
    assert rows["experts"].reason == "gradient is None on ranks 0"
    assert rows["experts"].error is None
    assert rows["q"].verdict == "pass"


def test_a_gradient_not_handed_over_fails() -> None:
    """Leaving a tensor out is no way to pass; neither is an unknown one."""
    expected = draw()
    actual = {name: tensor for name, tensor in expected.items() if name != "q"}
    assert judged(actual, expected)["q"].reason == "gradient was not handed over"
    fewer = {name: tensor for name, tensor in expected.items() if name != "q"}
    assert judged(expected, fewer)["q"].reason == "no gradient is expected here"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_fails(bad: float) -> None:
    """One such entry fails its tensor and is found."""
    expected = draw()
    actual = dict(expected, q=expected["q"].clone())
    actual["q"][5, 0] = bad
    for dtype in (F64, F32, BF16):
        row = judged(actual, expected, dtype)["q"]
        assert (row.verdict, row.error, row.scale) == ("fail", None, None)
        assert row.worst == {"rank": 0, "expert": None, "row": 5}


def test_a_family_that_is_zero_throughout_fails() -> None:
    """Both norms zero on both sides agree, and still fail; one zero tensor of two passes."""
    expected = draw()
    expected["norm"] = torch.zeros(48, dtype=F64)
    assert judged(expected, expected)["norm"].verdict == "pass"
    expected["norm2"] = torch.zeros(48, dtype=F64)
    rows = judged(expected, expected)
    assert rows["norm"].verdict == rows["norm2"].verdict == "fail"
    assert rows["norm"].reason is not None
    assert "all zero" in rows["norm"].reason
    assert rows["q"].verdict == "pass"


def test_a_structural_zero_is_measured_against_its_family() -> None:
    """Round-off against round-off passes where declared; a real gradient there fails."""
    expected = draw()
    expected["router"] *= 1e-17
    actual = dict(expected, router=-expected["router"])
    declared = frozenset({"router"})
    row = judged(actual, expected, F64, declared)["router"]
    assert (row.verdict, row.scale, row.ratio, row.residual) == ("pass", None, None, None)
    assert judged(actual, expected)["router"].verdict == "fail"
    actual["router"] = 1e-3 * draw(5)["router"]
    assert judged(actual, expected, F64, declared)["router"].verdict == "fail"


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"), [(BF16, 1.5e-2, 2.5e-2), (F16, 2.5e-3, 3.5e-3)]
)
def test_16_bits_are_judged_by_scale(dtype: torch.dtype, inside: float, outside: float) -> None:
    """The limit is printed as threshold; the residual is still reported."""
    expected = draw()
    near = judged({n: t * (1 + inside) for n, t in expected.items()}, expected, dtype)
    assert {row.verdict for row in near.values()} == {"pass"}
    far = judged({n: t * (1 - outside) for n, t in expected.items()}, expected, dtype)
    assert {row.verdict for row in far.values()} == {"fail"}
    row = judged(noisy(expected, 6, dtype), expected, dtype)["q"]
    assert (row.verdict, row.threshold) == ("pass", threshold(dtype))
    assert row.residual == pytest.approx(6 * UNIT_ROUNDOFF[dtype], rel=1e-2)


def test_a_wrong_direction_with_scale_one_fails_in_bf16() -> None:
    """Orthogonal noise of 0.8 leaves the scale at 1."""
    expected = draw()
    noise = draw(3)["q"]
    noise -= expected["q"] * (noise * expected["q"]).sum() / expected["q"].square().sum()
    actual = dict(expected, q=expected["q"] + 0.8 * noise * expected["q"].norm() / noise.norm())
    row = judged(actual, expected, BF16)["q"]
    assert row.scale == pytest.approx(1.0, abs=1e-9)
    assert row.verdict == "fail"


def test_an_idle_expert_is_held_to_the_scales_limit_in_bf16() -> None:
    """A tenth of the family's norm on the idle expert fails though 64 u is 0.25."""
    expected = draw()
    for part, verdict in ((0.1, "fail"), (0.01, "pass")):
        actual = dict(expected, experts=expected["experts"].clone())
        actual["experts"][3, 0, 0] = part * float(expected["experts"].norm())
        assert judged(actual, expected, BF16)["experts"].verdict == verdict


# ---------------------------------------------------------------- leak


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


# ---------------------------------------------------------------- loss, norm, routing


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"), [(F64, 6e-15, 1e-12), (F32, 3e-6, 5e-6), (BF16, 1e-2, 3e-2)]
)
def test_loss_is_judged_relatively(dtype: torch.dtype, inside: float, outside: float) -> None:
    """One row about the whole model; a scalar off by round-off of a lower dtype still fails."""
    for off, verdict in ((inside, "pass"), (outside, "fail")):
        (row,) = loss_rows(context(dtype), 7.0 * (1 + off), 7.0)
        assert (row.quantity, row.family, row.tensor, row.verdict) == ("loss", None, None, verdict)
        assert row.error == pytest.approx(off, rel=0.2)
    (broken,) = loss_rows(context(dtype), math.nan, 7.0)
    assert (broken.verdict, broken.error) == ("fail", None)
    broken.to_json()


def test_the_worst_ranks_norm_is_judged() -> None:
    """Rank 2 alone is wrong: 7.236 for 10.954."""
    (row,) = grad_norm_rows(context(F32), [10.954, 10.954, 7.236, 10.954], 10.954)
    assert (row.quantity, row.verdict) == ("grad_norm", "fail")
    assert row.worst == {"rank": 2, "expert": None, "row": None}
    assert row.ratio == pytest.approx(7.236 / 10.954)
    (fine,) = grad_norm_rows(context(F32), [10.954 * (1 + 1e-6)] * 4, 10.954)
    assert (fine.verdict, fine.worst) == ("pass", None)
    (infinite,) = grad_norm_rows(context(F32), [10.954, math.inf], 10.954)
    assert infinite.verdict == "fail"


def maps() -> list[list[Tensor]]:
    """Routing of one rank's step: two micro-batches of two layers, 3 tokens, k 2."""
    return [
        [torch.tensor([[0, 1], [2, 3], [1, 3]]) + 4 * layer for layer in range(2)]
        for _ in range(2)
    ]


def test_routing_ignores_the_order_of_choices() -> None:
    """Each layer has a row; (1, 0) is (0, 1)."""
    flipped = [[layer.flip(-1) for layer in micro] for micro in maps()]
    rows = routing_rows(context(), [flipped] * 4, [maps()] * 2, LAYOUT)
    assert [(row.tensor, row.error, row.verdict) for row in rows] == [
        ("moe.0", 0.0, "pass"),
        ("moe.1", 0.0, "pass"),
    ]
    assert rows[0].ratio is rows[0].scale is rows[0].residual is None


def test_one_flipped_token_fails_its_layer_and_is_named() -> None:
    """Rank 3 sends token 2 of micro-batch 1 elsewhere in layer 1: one entry, also of the lanes."""
    actual = [maps() for _ in range(4)]
    actual[3][1][1][2, 0] = 4
    rows = routing_rows(context(), actual, [maps()] * 2, LAYOUT, ["a", "b"])
    assert [(row.tensor, row.error, row.verdict) for row in rows] == [
        ("a", 0.0, "pass"),
        ("b", 1.0, "fail"),
    ]
    assert rows[1].worst == {"rank": 3, "expert": None, "row": 2}
    assert rows[1].detail == {"lanes_differ": 1}


def test_each_dp_rank_has_its_own_expected_map() -> None:
    """Ranks 2, 3 are dp rank 1: with dp maps exchanged all ranks differ."""
    other = [[layer.flip(0) for layer in micro] for micro in maps()]
    expected = [maps(), other]
    fine = routing_rows(context(), [maps(), maps(), other, other], expected, LAYOUT)
    assert {row.verdict for row in fine} == {"pass"}
    wrong = routing_rows(context(), [other, other, maps(), maps()], expected, LAYOUT)
    assert {row.verdict for row in wrong} == {"fail"}
    assert wrong[0].detail == {"lanes_differ": 0}


def test_missing_maps_differ_wholly() -> None:
    """A rank that reports one micro-batch of two, or fewer tokens, fails."""
    short = routing_rows(context(), [maps(), maps(), maps()[:1], maps()], [maps()] * 2, LAYOUT)
    assert [row.error for row in short] == [6.0, 6.0]
    fewer = [[layer[:2] for layer in micro] for micro in maps()]
    rows = routing_rows(context(), [fewer] + [maps()] * 3, [maps()] * 2, LAYOUT)
    assert {row.verdict for row in rows} == {"fail"}


# ---------------------------------------------------------------- replica


def replicas(pieces: list[Tensor], placement: str = "norm") -> Assembled:
    """Assemble one tensor from four ranks."""
    return assemble(LAYOUT, {placement: PLACEMENTS[placement]}, [{placement: p} for p in pieces])


def test_replicas_that_agree_pass_with_zero() -> None:
    """One row per tensor, also where nothing differs."""
    (row,) = replica_rows(
        context(), replicas([torch.ones(3)] * 4), PLACEMENTS, LAYOUT, "parameter"
    )
    assert (row.quantity, row.error, row.threshold, row.verdict) == ("replica", 0.0, 0.0, "pass")
    assert (row.family, row.detail) == ("layernorm", {"kind": "parameter"})


def test_one_bit_between_replicas_fails() -> None:
    """The last bit of one entry on rank 2 is enough, in float64 too."""
    pieces = [torch.ones(3, dtype=F64) for _ in range(4)]
    pieces[2][1] += 2.0**-52
    (row,) = replica_rows(context(), replicas(pieces), PLACEMENTS, LAYOUT, "gradient")
    assert (row.error, row.verdict) == (1.0, "fail")
    assert row.worst == {"rank": 2, "expert": None, "row": 1}
    row.to_json()


def test_expert_replicas_are_those_of_one_ep_rank() -> None:
    """Ranks 0, 2 share experts 0, 1 and ranks 1, 3 experts 2, 3; a difference names the expert."""
    pieces = [torch.full((2, 3, 1), float(rank % 2)) for rank in range(4)]
    (row,) = replica_rows(context(), replicas(pieces, "experts"), PLACEMENTS, LAYOUT, "gradient")
    assert row.verdict == "pass"
    pieces[3][1, 2] = 9.0
    (row,) = replica_rows(context(), replicas(pieces, "experts"), PLACEMENTS, LAYOUT, "gradient")
    assert (row.error, row.worst) == (1.0, {"rank": 3, "expert": 3, "row": 2})


def test_nccl_may_round_differently_across_communicators() -> None:
    """Lanes 0, 2 against 1, 3 differ by a bit: fine on NCCL; within a dp group it is not."""
    nccl = context(F32, engine={"backend": "nccl"})
    off = torch.full((3,), 1 + 2.0**-23)
    lanes = [torch.ones(3), off, torch.ones(3), off]
    (row,) = replica_rows(nccl, replicas(lanes), PLACEMENTS, LAYOUT, "gradient")
    assert (row.error, row.verdict) == (3.0, "pass")
    within = [torch.ones(3), torch.ones(3), off, off]
    (row,) = replica_rows(nccl, replicas(within), PLACEMENTS, LAYOUT, "gradient")
    assert row.verdict == "fail"
    far = [torch.ones(3), 1.001 * off, torch.ones(3), 1.001 * off]
    (row,) = replica_rows(nccl, replicas(far), PLACEMENTS, LAYOUT, "gradient")
    assert row.verdict == "fail"


def test_gradients_none_everywhere_have_no_replica_row() -> None:
    """Replicas of nothing are not compared; None beside a tensor fails."""
    table = {"norm": PLACEMENTS["norm"]}
    nowhere = assemble(LAYOUT, table, [{"norm": None}] * 4)
    assert replica_rows(context(), nowhere, PLACEMENTS, LAYOUT, "gradient") == []
    some = assemble(LAYOUT, table, [{"norm": torch.ones(2)}] * 3 + [{"norm": None}])
    (row,) = replica_rows(context(), some, PLACEMENTS, LAYOUT, "gradient")
    assert (row.error, row.verdict) == (2.0, "fail")
    row.to_json()


# ---------------------------------------------------------------- update

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(name="sgd"),
    "momentum": Optimizer(name="momentum", weight_decay=0.01),
    "adam": Optimizer(name="adam", weight_decay=0.01),
    "adamw": Optimizer(name="adamw", weight_decay=0.01),
    "lion": Optimizer(name="lion", weight_decay=0.01),
}
LR = 0.5


@dataclasses.dataclass
class Trainer:
    """An engine in one dtype whose every part can be made wrong.

    corrupt: applied to the true gradient, gives the engine's own. spoil: applied to the engine's
    deltas. norm_factor: what it gets its norm wrong by.
    """

    dtype: torch.dtype
    spec: Optimizer
    clip: float = 0.0
    corrupt: Callable[[Tensors], Tensors] = lambda tensors: tensors
    spoil: Callable[[Tensors], Tensors] = lambda tensors: tensors
    norm_factor: float = 1.0
    lr: float = LR
    seed: int = 0
    weight_dtype: torch.dtype | None = None
    structural_zero: frozenset[str] = frozenset()

    def rows(self, steps: int = 1) -> dict[str, Row]:
        """Take some steps and give the last one's rows."""
        held = self.weight_dtype or self.dtype
        weights = {name: t.to(held) for name, t in draw(self.seed + 500).items()}
        weights["experts"][-1] = 0.25
        engine = ReferenceOptimizer(self.spec, self.lr)
        truth, own = ReferenceOptimizer(self.spec, self.lr), ReferenceOptimizer(self.spec, self.lr)
        rows: list[Row] = []
        for number in range(steps):
            true = draw(self.seed + number)
            grads = {n: t.to(self.dtype) for n, t in self.corrupt(dict(true)).items()}
            max_norm = self.clip * norm(true.values())
            wide = {n: t.double() for n, t in grads.items()}
            factor = 1.0
            if max_norm:
                factor = min(1.0, max_norm / (self.norm_factor * norm(wide.values()) + 1e-6))
            deltas = engine.step(
                {n: t.double() for n, t in weights.items()},
                {n: t * factor for n, t in wide.items()},
            )
            after = {n: (weights[n].double() + d).to(held) for n, d in self.spoil(deltas).items()}
            step = OptimizerStep(given(weights), given(after), given(grads), true, max_norm)
            rows = update_rows(
                context(self.dtype), step, truth, own, PLACEMENTS, LAYOUT,
                weight_dtype=self.weight_dtype, structural_zero=self.structural_zero,
            )  # fmt: skip
            weights = after
        for row in rows:
            row.to_json()
        return {str(row.tensor): row for row in rows}


def verdicts(rows: Mapping[str, Row]) -> set[str]:
    """Collect the verdicts."""
    return {row.verdict for row in rows.values()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_right_step_passes(name: str, dtype: torch.dtype, clip: float, seed: int) -> None:
    """Three steps with gradients 10 u off, clip off and on: every row passes, end to end too."""
    trainer = Trainer(
        dtype, OPTIMIZERS[name], clip, lambda t: noisy(t, 10, dtype, seed + 7), seed=10 * seed
    )
    rows = trainer.rows(3)
    assert verdicts(rows) == {"pass"}
    for row in rows.values():
        assert row.detail is not None
        assert row.threshold is not None
        end_to_end = name in ("sgd", "momentum") or dtype is F64
        assert row.detail["judged"] == ("end_to_end" if end_to_end else "own_gradient")
        assert row.detail["end_to_end_scale"] == pytest.approx(1.0, abs=1e-4)


def test_the_threshold_is_bound_plus_printed_floor() -> None:
    """|w| 5, delta (0.3, 0.4) under SGD: floor = u (5 + |w1|) / 0.5, bound 64 u or twice that."""
    before = torch.tensor([3.0, 4.0], dtype=F64)
    grad = torch.tensor([-3.0, -4.0], dtype=F64)
    after = before + torch.tensor([0.3, 0.4], dtype=F64)
    for dtype, bounds in ((F64, 1), (F32, 2)):
        sgd = [ReferenceOptimizer(Optimizer(), 0.1) for _ in range(2)]
        step = OptimizerStep(
            given({"norm": before}), given({"norm": after}), given({"norm": grad}), {"norm": grad}
        )
        (row,) = update_rows(context(dtype), step, sgd[0], sgd[1], PLACEMENTS, LAYOUT)
        unit = UNIT_ROUNDOFF[dtype]
        assert row.detail is not None
        assert row.detail["floor"] == pytest.approx(unit * (5 + 5.5) / 0.5)
        assert row.threshold == pytest.approx(bounds * FACTOR * unit + row.detail["floor"])


def times(factor: float, *names: str) -> Callable[[Tensors], Tensors]:
    """Give a fault that scales some tensors."""
    return lambda tensors: {
        name: tensor * factor if name in names else tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [F64, F32])
def test_sgd_shows_a_factor_that_adam_hides(dtype: torch.dtype) -> None:
    """Experts x 4 (never uncancelled): SGD's row fails with scale 4, Adam's own step passes."""
    sgd = Trainer(dtype, OPTIMIZERS["sgd"], corrupt=times(4.0, "experts")).rows()
    assert sgd["experts"].verdict == "fail"
    assert sgd["experts"].scale == pytest.approx(4.0, rel=1e-5)
    assert sgd["q"].verdict == "pass"
    adam = Trainer(dtype, Optimizer(name="adam"), corrupt=times(4.0, "experts")).rows()
    detail = adam["experts"].detail
    assert detail is not None
    assert detail["end_to_end_scale"] == pytest.approx(1.0, abs=1e-6)
    assert detail["own_error"] < 1e-5
    if dtype is F32:
        assert adam["experts"].verdict == "pass"


def test_float64_sees_adams_eps() -> None:
    """Adam(4 g, eps) is Adam(g, eps / 4): 1e-8 in float64, far over 64 u end to end."""
    row = Trainer(F64, Optimizer(name="adam"), corrupt=times(4.0, "experts")).rows()["experts"]
    assert row.verdict == "fail"
    assert row.error is not None
    assert 1e-10 < row.error < 1e-5


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 2e-5, "fail"), (1 + 3e-6, "pass")])
def test_float32_sgd_is_judged_end_to_end(factor: float, verdict: str) -> None:
    """A gradient factor shows in the delta down to its two bounds and the floor."""
    rows = Trainer(F32, OPTIMIZERS["sgd"], corrupt=times(factor, "q")).rows()
    assert rows["q"].verdict == verdict


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_step_with_another_size_fails(dtype: torch.dtype, name: str) -> None:
    """The optimizer's delta 1.001 times too large, with right gradients, fails; 1 + u does not."""
    wrong = Trainer(dtype, OPTIMIZERS[name], spoil=times(1.001, "q")).rows()
    assert (wrong["q"].verdict, wrong["norm"].verdict) == ("fail", "pass")
    assert wrong["q"].reason is not None
    assert "own gradient" in wrong["q"].reason
    unit = UNIT_ROUNDOFF[dtype]
    assert verdicts(Trainer(dtype, OPTIMIZERS[name], spoil=times(1 + unit, "q")).rows()) == {"pass"}


def test_a_compensated_step_fails_by_its_own_gradient() -> None:
    """Gradient x 4 and step / 4 give the right delta: end to end fine, the own step is not."""
    trainer = Trainer(F32, OPTIMIZERS["sgd"], corrupt=times(4.0, "q"), spoil=times(0.25, "q"))
    row = trainer.rows()["q"]
    assert row.error is not None
    assert row.threshold is not None
    assert row.error <= row.threshold
    assert row.verdict == "fail"
    assert row.detail is not None
    assert row.detail["own_error"] == pytest.approx(0.75, abs=1e-5)
    assert row.detail["own_error"] > row.detail["own_threshold"]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_clipping_by_a_wrong_norm_fails_everywhere(dtype: torch.dtype) -> None:
    """Gradients are right, the norm is 1.5 times too large: all deltas share one factor."""
    rows = Trainer(dtype, OPTIMIZERS["sgd"], clip=0.5, norm_factor=1.5).rows()
    assert verdicts(rows) == {"fail"}
    for row in rows.values():
        assert row.scale == pytest.approx(1 / 1.5, rel=1e-4)
    assert verdicts(Trainer(dtype, OPTIMIZERS["sgd"], norm_factor=1.5).rows()) == {"pass"}


@pytest.mark.parametrize("dtype", [F64, F32])
def test_clipping_not_applied_fails(dtype: torch.dtype) -> None:
    """A norm far too small switches clipping off: scale 2 at a limit of half the norm."""
    rows = Trainer(dtype, OPTIMIZERS["momentum"], clip=0.5, norm_factor=1e-3).rows()
    assert verdicts(rows) == {"fail"}


def keep_idle(tensors: Tensors) -> Tensors:
    """Skip the step of the idle expert."""
    out = dict(tensors, experts=tensors["experts"].clone())
    out["experts"][-1] = 0.0
    return out


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "lion"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_an_idle_expert_still_decays(dtype: torch.dtype, name: str) -> None:
    """Its zero gradient is exact, so nothing is excluded: a skipped decay fails."""
    row = Trainer(dtype, OPTIMIZERS[name], spoil=keep_idle).rows()["experts"]
    assert (row.verdict, row.worst is not None and row.worst["expert"]) == ("fail", 3)
    assert verdicts(Trainer(dtype, OPTIMIZERS[name]).rows()) == {"pass"}


def test_a_none_gradient_is_judged_as_zero() -> None:
    """An engine that skips a tensor without gradient misses the decay."""
    weights = {"norm": torch.ones(48, dtype=F64), "q": torch.ones(24, 20, dtype=F64)}
    true = {"norm": torch.zeros(48, dtype=F64), "q": torch.ones(24, 20, dtype=F64)}
    spec = Optimizer(weight_decay=0.1)
    for decay, verdict in ((0.0, "fail"), (0.5 * 0.1, "pass")):
        after = {"norm": weights["norm"] - decay, "q": weights["q"] * (1 - 0.05) - 0.5}
        step = OptimizerStep(
            given(weights), given(after), given({"norm": None, "q": true["q"]}), true
        )
        pair = [ReferenceOptimizer(spec, 0.5) for _ in range(2)]
        rows = update_rows(context(), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert [row.verdict for row in rows] == [verdict, "pass"]


@pytest.mark.parametrize("name", ["adam", "lion"])
def test_elements_lost_in_roundoff_are_excluded_and_counted(name: str) -> None:
    """An entry of 1e-17 whose sign the engine has otherwise is not judged; one of 1e-12 is."""
    spec = Optimizer(name="adam", eps=1e-30) if name == "adam" else OPTIMIZERS[name]
    for size, verdict, count in ((1e-17, "pass", 1), (1e-12, "fail", 0)):
        true = draw()["q"]
        true[2, 3] = size
        own = true.clone()
        own[2, 3] = -size
        weight = draw(1)["q"]
        after = weight + ReferenceOptimizer(spec, LR).step({"q": weight}, {"q": own})["q"]
        step = OptimizerStep(given({"q": weight}), given({"q": after}), given({"q": own}),
                             {"q": true})  # fmt: skip
        pair = [ReferenceOptimizer(spec, LR) for _ in range(2)]
        (row,) = update_rows(context(), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert row.verdict == verdict
        assert row.detail is not None
        assert row.detail["excluded"] == count
        assert row.detail.get("excluded_at") == ([[2, 3]] if count else None)


@pytest.mark.parametrize("size", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_that_is_not_finite_fails(name: str, size: float) -> None:
    """Also where the element would be excluded."""
    true = draw()["q"]
    true[2, 3] = 1e-19
    weight, after = draw(1)["q"], draw(2)["q"]
    after = weight + ReferenceOptimizer(OPTIMIZERS[name], LR).step({"q": weight}, {"q": true})["q"]
    after[2, 3] = size
    for dtype in (F64, F32, BF16):
        step = OptimizerStep(given({"q": weight}), given({"q": after}), given({"q": true}),
                             {"q": true})  # fmt: skip
        pair = [ReferenceOptimizer(OPTIMIZERS[name], LR) for _ in range(2)]
        (row,) = update_rows(context(dtype), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert (row.verdict, row.error) == ("fail", None)


def test_a_floor_over_one_percent_is_skipped() -> None:
    """lr 1e-6 in float32 drowns the delta in the weights' rounding; lr 1e-4 does not."""
    drowned = Trainer(F32, OPTIMIZERS["sgd"], lr=1e-6).rows()["q"]
    assert (drowned.verdict, drowned.reason) == ("skipped", "below resolution")
    assert drowned.detail is not None
    assert drowned.detail["floor"] > 1e-2
    assert Trainer(F32, OPTIMIZERS["sgd"], lr=1e-4).rows()["q"].verdict == "pass"


def test_a_wrong_number_is_never_skipped() -> None:
    """A delta beyond even its floor fails at any resolution."""
    row = Trainer(F32, OPTIMIZERS["sgd"], lr=1e-6, spoil=times(9.0, "q")).rows()["q"]
    assert row.verdict == "fail"


def test_master_weights_are_judged_at_their_own_roundoff() -> None:
    """bf16 gradients, float32 weights: the own step is exact, end to end goes by scale."""
    own = {"dtype": BF16, "weight_dtype": F32}
    spec = OPTIMIZERS["sgd"]
    rows = Trainer(BF16, spec, weight_dtype=F32).rows()
    assert verdicts(rows) == {"pass"}
    for row in rows.values():
        assert row.detail is not None
        assert row.detail["own_threshold"] < 1e-5
    assert verdicts(Trainer(**own, spec=spec, corrupt=times(1.01, *SHAPES)).rows()) == {"pass"}  # type: ignore[arg-type]
    assert verdicts(Trainer(**own, spec=spec, corrupt=times(1.03, *SHAPES)).rows()) == {"fail"}  # type: ignore[arg-type]
    assert verdicts(Trainer(**own, spec=spec, spoil=times(1.0001, *SHAPES)).rows()) == {"fail"}  # type: ignore[arg-type]


def test_a_leaking_gradient_leaks_into_the_update() -> None:
    """The optimizer did right by a gradient that was rounded: leak, not fail."""
    rounded = Trainer(
        F64, OPTIMIZERS["sgd"], corrupt=lambda t: {n: g.to(F32).double() for n, g in t.items()}
    )
    assert verdicts(rounded.rows()) == {"leak"}
    assert verdicts(dataclasses.replace(rounded, spoil=times(1.001, *SHAPES)).rows()) == {"fail"}


def structural(name: Any, size: float, declared: bool) -> Row:
    """Step a router whose true gradient is round-off and whose own one has the given size."""
    spec = Optimizer(name=name)
    true = {"router": 1e-17 * draw()["router"], "q": draw()["q"]}
    own = {"router": size * draw(8)["router"], "q": draw()["q"]}
    before = {held: draw(500)[held] for held in true}
    deltas = ReferenceOptimizer(spec, LR).step(before, own)
    after = {held: before[held] + deltas[held] for held in true}
    step = OptimizerStep(given(before), given(after), given(own), true)
    rows = update_rows(
        context(), step, ReferenceOptimizer(spec, LR), ReferenceOptimizer(spec, LR), PLACEMENTS,
        LAYOUT, structural_zero=frozenset({"router"} if declared else ()),
    )  # fmt: skip
    return rows[0]


def test_a_structural_zero_steps_by_its_own_gradient() -> None:
    """Two round-offs have no common direction: sign-like steps of them are judged alone."""
    assert structural("sgd", 1e-17, declared=True).verdict == "pass"
    assert structural("sgd", 1e-3, declared=True).verdict == "fail"
    for name in ("adam", "lion"):
        row = structural(name, 1e-17, declared=True)
        assert row.detail is not None
        assert row.detail["judged"] == "own_gradient"
        assert row.verdict in ("pass", "skipped")
    assert structural("lion", 1e-17, declared=True).verdict == "pass"


@pytest.mark.parametrize("seed", range(4))
def test_adam_is_not_judged_where_it_amplifies(seed: int) -> None:
    """One entry of 1e-7 off by 10 u rms moves 1e8 u: excluded, counted, and judged alone."""
    expected = draw(seed)["q"]
    expected[2, 3] = 1e-7
    own = expected.clone()
    own[2, 3] += 10 * UNIT_ROUNDOFF[F64]
    weight = draw(seed + 500)["q"]
    spec = Optimizer(name="adam")
    for factor, verdict in ((1.0, "pass"), (1.01, "fail")):
        delta = ReferenceOptimizer(spec, LR).step({"q": weight}, {"q": own})["q"]
        delta[2, 3] *= factor
        step = OptimizerStep(
            given({"q": weight}), given({"q": weight + delta}), given({"q": own}), {"q": expected}
        )
        pair = [ReferenceOptimizer(spec, LR) for _ in range(2)]
        (row,) = update_rows(context(), step, pair[0], pair[1], PLACEMENTS, LAYOUT)
        assert row.verdict == verdict
        assert row.detail is not None
        assert [2, 3] in row.detail["excluded_at"]
        assert row.detail["excluded"] <= 2
