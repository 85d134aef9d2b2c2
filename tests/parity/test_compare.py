"""Metrics, thresholds and verdicts: every rule has a fault that trips it and a near miss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parity.collect import Assembled, assemble
from parity.compare import (
    UNIT_ROUNDOFF,
    grad_norm_rows,
    loss_rows,
    metrics,
    norm,
    replica_rows,
    routing_rows,
    threshold,
)
from parity.errors import ParityError
from tests.parity.example_tensors import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUT,
    PLACEMENTS,
    context,
    draw,
    judged,
    noisy,
)

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
    power = (
        torch.tensor(exponent // 2, dtype=F64).exp2(),
        torch.tensor(exponent - exponent // 2, dtype=F64).exp2(),
    )
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


def test_a_norm_no_rank_reports_is_skipped_with_its_reason() -> None:
    """None on every rank: skipped; on one of them: that rank fails."""
    (row,) = grad_norm_rows(context(F32), [None, None], 10.954)
    assert (row.verdict, row.reason) == ("skipped", "the engine reports no norm")
    (half,) = grad_norm_rows(context(F32), [10.954, None], 10.954)
    assert half.verdict == "fail"
    assert half.worst == {"rank": 1, "expert": None, "row": None}


def maps() -> list[list[Tensor]]:
    """Routing of one rank's step: two micro-batches of two layers, 3 tokens, k 2."""
    return [
        [torch.tensor([[0, 1], [2, 3], [1, 3]]) + 4 * layer for layer in range(2)] for _ in range(2)
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
    (row,) = replica_rows(context(), replicas([torch.ones(3)] * 4), PLACEMENTS, LAYOUT, "parameter")
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
