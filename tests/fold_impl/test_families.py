"""The gradient contract as a table: family and cuts -> rule, axis and divisor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fold_impl.families import Family, FoldedParameter, Placement, Rule, Shard, replicas, rule_of
from fold_impl.layout import FoldLayout

LAYOUT = FoldLayout(24, tp_size=4, ep_size=3, etp_size=2)
"""tp 4, dp 6; ep 3, etp 2, edp 4: no two products agree by chance."""
OVER_TP = (Shard("tp", 0),)
OVER_EXPERTS = (Shard("ep", 0), Shard("etp", 1))


@pytest.mark.parametrize(
    ("family", "shards", "rule", "axis", "divisor"),
    [
        ("router", (), Rule.AVERAGE, "stage", 24),
        ("layernorm", (), Rule.AVERAGE, "stage", 24),
        ("embedding", (), Rule.AVERAGE, "stage", 24),
        ("dense", (), Rule.AVERAGE, "stage", 24),
        ("shared_expert", (), Rule.AVERAGE, "stage", 24),
        ("attention", (), Rule.AVERAGE, "stage", 24),
        ("dense", OVER_TP, Rule.SKIP, "dp", 6),
        ("attention", OVER_TP, Rule.SKIP, "dp", 6),
        ("shared_expert", OVER_TP, Rule.SKIP, "dp", 6),
        ("expert", OVER_EXPERTS, Rule.EXPERT_TP_CANCEL, "edp", 24),
    ],
)
def test_rule_of_a_family_under_route_full(
    family: Family, shards: tuple[Shard, ...], rule: Rule, axis: str, divisor: int
) -> None:
    """SPEC section 2: the rule follows replication, experts divide by tp * dp, never by edp (4)."""
    placement = Placement(family, shards)
    assert rule_of(placement) is rule
    assert (rule.axis(), rule.divisor(LAYOUT)) == (axis, divisor)


def test_a_parameter_is_not_partial_unless_it_is_said_to_be() -> None:
    """Lanes agree on the gradient of what is replicated; a sum would be tp times too large."""
    weight = nn.Parameter(torch.zeros(1))
    assert not FoldedParameter("norm", weight, Placement("layernorm")).partial


def test_a_partial_parameter_is_summed_unless_it_is_sharded_or_an_expert() -> None:
    """A norm inside a head is replicated, but a lane sees its own heads only: SUM over tp."""
    assert rule_of(Placement("layernorm"), partial=True) is Rule.SUM
    assert rule_of(Placement("layernorm"), partial=False) is Rule.AVERAGE
    assert rule_of(Placement("attention", OVER_TP), partial=True) is Rule.SKIP
    assert rule_of(Placement("expert", OVER_EXPERTS), partial=True) is Rule.EXPERT_TP_CANCEL


@pytest.mark.parametrize(
    ("rule", "axis", "divisor"), [(Rule.SUM, "stage", 6), (Rule.EXPERT, "edp", 6)]
)
def test_rules_of_the_other_strategies_miss_by_tp(rule: Rule, axis: str, divisor: int) -> None:
    """SUM for AVERAGE and EXPERT for EXPERT_TP_CANCEL sum over the same axis and divide tp less."""
    assert (rule.axis(), rule.divisor(LAYOUT)) == (axis, divisor)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ((), 24),
        (OVER_TP, 6),
        ((Shard("ep", 0),), 8),
        (OVER_EXPERTS, 4),
    ],
)
def test_replicas_are_the_ranks_of_a_stage_with_the_same_part(
    shards: tuple[Shard, ...], expected: int
) -> None:
    """Replicated: all 24; TP-sharded: dp = 6; experts: edp = 4, whichever lanes they sit on."""
    assert replicas(Placement("dense", shards), LAYOUT) == expected
