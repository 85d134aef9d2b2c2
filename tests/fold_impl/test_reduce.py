"""Local gradients -> the objective's: rules on hand-made numbers, buckets, norm and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from fold_impl.families import Family, FoldedParameter, Placement, Rule, Shard
from fold_impl.groups import FoldGroups
from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from fold_impl.reduce import clip_coefficient, global_norm, reduce_gradients
from tests.worlds import alone, fold_groups, random, run_ranks

LAYOUT = FoldLayout(4, tp_size=2, ep_size=2)
"""Ranks 0..3: tp 01 23, dp 02 13, ep 01 23, edp 02 13."""
LOCAL = [1.0, 10.0, 100.0, 1000.0]
"""Gradient of rank r, so that every sum tells which ranks are in it."""


def member(
    name: str, family: Family, *shards: Shard, value: float | None = 1.0, size: int = 1
) -> FoldedParameter:
    """Make a parameter of `size` elements whose gradient is `value` everywhere."""
    parameter = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    if value is not None:
        parameter.grad = torch.full((size,), value, dtype=torch.float64)
    return FoldedParameter(name, parameter, Placement(family, shards))


def each_rank(work: Callable[[FoldGroups], Any], layout: FoldLayout = LAYOUT) -> list[Any]:
    """Run `work` on every rank with its groups."""
    return run_ranks(layout.world_size, lambda runtime: work(fold_groups(runtime, layout)))


def reduced(family: Family, *shards: Shard, points: Points | None = None) -> list[float]:
    """Reduce one parameter whose local gradients are LOCAL; the result on every rank."""

    def work(groups: FoldGroups) -> float:
        one = member("w", family, *shards, value=LOCAL[groups.rank])
        reduce_gradients([one], groups, points or Points())
        assert one.parameter.grad is not None
        return float(one.parameter.grad)

    return each_rank(work)


@pytest.mark.parametrize(
    ("family", "shards", "expected"),
    [
        ("router", (), [1111 / 4] * 4),  # mean over lanes, mean over dp
        ("layernorm", (), [1111 / 4] * 4),
        ("attention", (Shard("tp", 0),), [101 / 2, 1010 / 2, 101 / 2, 1010 / 2]),  # each lane's own
        ("expert", (Shard("ep", 0),), [101 / 4, 1010 / 4, 101 / 4, 1010 / 4]),  # sum / (tp dp)
    ],
)
def test_each_family_is_reduced_by_its_rule(
    family: Family, shards: tuple[Shard, ...], expected: list[float]
) -> None:
    """World 4, tp 2, ep 2: AVERAGE, SKIP and EXPERT_TP_CANCEL of 1, 10, 100, 1000."""
    assert reduced(family, *shards) == expected


def test_parts_of_a_replicated_parameter_are_summed_over_lanes() -> None:
    """A norm inside a head: each lane's gradient is of its own heads, so lanes add up: / dp."""

    def work(groups: FoldGroups) -> float:
        one = replace(member("w", "layernorm", value=LOCAL[groups.rank]), partial=True)
        reduce_gradients([one], groups, Points())
        assert one.parameter.grad is not None
        return float(one.parameter.grad)

    assert each_rank(work) == [1111 / 2] * 4


@pytest.mark.parametrize(
    ("family", "shards", "wrong", "factor"),
    [("router", (), Rule.SUM, 2), ("expert", (Shard("ep", 0),), Rule.EXPERT, 2)],
)
def test_a_wrong_rule_planted_shows_its_factor_tp(
    family: Family, shards: tuple[Shard, ...], wrong: Rule, factor: int
) -> None:
    """Faults router-sum and expert-uncancelled; planted for another family they change nothing."""

    def change(rule: Rule, family: Family, **_: Any) -> Rule:
        return wrong if family == target else rule

    points, target = Points(), family
    points.plant("reduce.rule", change)
    right = reduced(family, *shards)
    assert reduced(family, *shards, points=points) == [factor * g for g in right]
    target = "embedding"
    assert reduced(family, *shards, points=points) == right


def test_experts_on_the_same_lane_of_other_dp_ranks_are_summed_where_ep_crosses_lanes() -> None:
    """World 4, tp 2, ep 4: edp is 1, nothing to sum, yet the divisor is tp * dp = 4, not edp."""

    def work(groups: FoldGroups) -> float:
        one = member("w", "expert", Shard("ep", 0), value=LOCAL[groups.rank])
        reduce_gradients([one], groups, Points())
        assert one.parameter.grad is not None
        return float(one.parameter.grad)

    assert each_rank(work, FoldLayout(4, tp_size=2, ep_size=4)) == [g / 4 for g in LOCAL]


def test_a_parameter_without_a_gradient_on_one_rank_takes_part_with_zeros() -> None:
    """Only rank 3 has a gradient: every rank ends with 1000 / 4, none with None and none hangs."""

    def work(groups: FoldGroups) -> float:
        one = member("w", "router", value=1000.0 if groups.rank == 3 else None)
        reduce_gradients([one], groups, Points())
        assert one.parameter.grad is not None
        return float(one.parameter.grad)

    assert each_rank(work) == [250.0] * 4


def test_an_idle_expert_ends_with_a_zero_gradient_not_none() -> None:
    """None everywhere becomes zeros of the parameter's shape."""
    one = member("w", "expert", value=None, size=3)
    reduce_gradients([one], alone(), Points())
    assert one.parameter.grad is not None
    assert one.parameter.grad.tolist() == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------- buckets


def mixed(count: int, dtype: torch.dtype = torch.float64) -> list[FoldedParameter]:
    """Make `count` parameters of each of three rules, of different shapes."""
    made = []
    kinds: list[tuple[Family, tuple[Shard, ...]]] = [
        ("router", ()),
        ("attention", (Shard("tp", 0),)),
        ("expert", (Shard("ep", 0),)),
    ]
    for index in range(count):
        for family, shards in kinds:
            parameter = nn.Parameter(torch.zeros(2, index + 1, dtype=dtype))
            parameter.grad = random(2, index + 1, seed=index).to(dtype)
            made.append(FoldedParameter(f"{family}.{index}", parameter, Placement(family, shards)))
    return made


def collectives(
    monkeypatch: pytest.MonkeyPatch, parameters: list[FoldedParameter], **kwargs: Any
) -> int:
    """Count the all-reduces one rank issues for its gradients and their norm."""
    calls: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, group: Any = None) -> Any:
        calls.append(tensor.numel())
        return original(tensor, group=group)

    def work(groups: FoldGroups) -> None:
        same = [
            FoldedParameter(p.name, nn.Parameter(p.parameter.detach().clone()), p.placement)
            for p in parameters
        ]
        for copy, given in zip(same, parameters, strict=True):
            copy.parameter.grad = given.parameter.grad
        reduce_gradients(same, groups, Points(), **kwargs)
        global_norm(same, groups, Points())

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        each_rank(work)
    return len(calls) // LAYOUT.world_size


def test_the_number_of_collectives_does_not_grow_with_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three rules, one flat all-reduce each, one for the norm: 4, for 3 as for 60 parameters."""
    assert collectives(monkeypatch, mixed(1)) == 4
    assert collectives(monkeypatch, mixed(20)) == 4


def test_buckets_split_at_the_limit_and_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes 2, 4, 6 of a rule fit a limit of 6 as (2, 4) and (6); two dtypes are not mixed."""
    assert collectives(monkeypatch, mixed(3), bucket_numel=6) == 3 * 2 + 1
    # (2, 4, 6), (8, 10) and (12): a later bucket may be as full as the first
    assert collectives(monkeypatch, mixed(6), bucket_numel=18) == 3 * 3 + 1
    assert collectives(monkeypatch, mixed(1) + mixed(1, torch.float32)) == 3 * 2 + 1


@pytest.mark.parametrize("limit", [1, 5, 6, 1 << 20])
def test_bucketing_does_not_change_a_gradient(limit: int) -> None:
    """A parameter larger than the limit has a bucket of its own; shapes and values are kept."""
    parameters = mixed(4)
    before = [p.parameter.grad for p in parameters]
    reduce_gradients(parameters, alone(), Points(), bucket_numel=limit)
    for given, expected in zip(parameters, before, strict=True):
        assert given.parameter.grad is not None
        assert expected is not None
        assert given.parameter.grad.shape == given.parameter.shape
        assert torch.equal(given.parameter.grad, expected)


def test_points_see_every_gradient_before_and_after_and_every_bucket() -> None:
    """Names arrive with family and layout; what a point returns is what is kept."""
    seen: list[tuple[str, str]] = []
    points = Points()

    def note(gradient: Tensor, name: str, family: str, **_: Any) -> Tensor:
        seen.append((name, family))
        return gradient

    points.plant("reduce.gradient", note)
    points.plant("reduce.bucket", lambda flat, **_: flat + 1)
    points.plant("reduce.reduced", lambda gradient, **_: 10 * gradient)
    parameters = [member("a", "router", value=2.0), member("b", "expert", value=3.0)]
    reduce_gradients(parameters, alone(), points)
    assert seen == [("a", "router"), ("b", "expert")]
    assert [p.parameter.grad.tolist() for p in parameters if p.parameter.grad is not None] == [
        [30.0],
        [40.0],
    ]


# ---------------------------------------------------------------- norm


def norms(make: Callable[[FoldGroups], list[FoldedParameter]], points: Points | None = None) -> Any:
    """Compute the global norm on every rank."""
    return each_rank(lambda groups: global_norm(make(groups), groups, points or Points()))


def shards_by_hand(groups: FoldGroups) -> list[FoldedParameter]:
    """Replicated 2; TP shards 3, 6 by lane; experts 4, 8 by ep rank, equal on edp replicas."""
    return [
        member("router", "router", value=2.0),
        member("attention", "attention", Shard("tp", 0), value=[3.0, 6.0][groups.tp.index]),
        member("expert", "expert", Shard("ep", 0), value=[4.0, 8.0][groups.ep.index]),
    ]


def test_the_global_norm_counts_each_distinct_shard_once() -> None:
    """sqrt(2^2 + 3^2 + 6^2 + 4^2 + 8^2) = sqrt(129) on every rank, whatever is replicated."""
    assert norms(shards_by_hand) == [pytest.approx(math.sqrt(129), rel=1e-15)] * 4


def test_counting_replicas_or_dropping_a_shard_is_another_number() -> None:
    """Fault norm-replicas-counted, planted at norm.square: each part as often as it is held."""
    points = Points()
    points.plant("norm.square", lambda square, copies, **_: square * copies)
    # replicated: 4 copies; TP shards: dp = 2 each; experts: edp = 2 each
    expected = math.sqrt(4 * 4 + 2 * (9 + 36) + 2 * (16 + 64))
    assert norms(shards_by_hand, points) == [pytest.approx(expected, rel=1e-15)] * 4


def test_the_norm_of_no_gradient_is_zero_and_the_total_can_be_watched() -> None:
    """Before any backward there is nothing to add; norm.total passes the result."""
    assert global_norm([member("w", "dense", value=None)], alone(), Points()) == 0.0
    points = Points()
    points.plant("norm.total", lambda norm, **_: norm / 2)
    assert global_norm([member("w", "dense", value=8.0)], alone(), points) == 4.0


def test_squares_of_float16_gradients_are_added_in_float64() -> None:
    """1000^2 overflows float16 (65504); four of them are 2000."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    parameter.grad = torch.full((4,), 1000.0, dtype=torch.float16)
    one = FoldedParameter("w", parameter, Placement("dense"))
    assert global_norm([one], alone(), Points()) == 2000.0


@pytest.mark.parametrize(
    ("norm", "limit", "expected"),
    [
        (2.0, 1.0, 1.0 / 2.000001),
        (0.5, 1.0, 1.0),
        (1.0, 1.0, 1.0 / 1.000001),
        (5.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
    ],
)
def test_clipping_brings_the_norm_down_and_never_up(
    norm: float, limit: float, expected: float
) -> None:
    """min(1, limit / (norm + 1e-6)); a limit of 0 is off."""
    assert clip_coefficient(norm, limit) == pytest.approx(expected, rel=1e-15)
