"""Parameter -> family, cuts and reduction rule.

Owns the gradient contract of SPEC section 2 as one table. Must not know modules' forward or
collectives. Easy to get wrong: the rule is keyed to how a parameter is replicated, not to the EP
layout; expert gradients divide by the *dense* dp size, never by edp.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from torch import nn

from fold_impl.layout import FoldLayout

Family = Literal[
    "router", "layernorm", "dense", "attention", "embedding", "expert", "shared_expert"
]


@dataclass(frozen=True)
class Shard:
    """One cut: dimension `dim` over `axis`; `segments` blocks are cut each on its own."""

    axis: Literal["tp", "ep", "etp"]
    dim: int
    segments: int = 1


@dataclass(frozen=True)
class Placement:
    """Family of a parameter and the cuts between its full logical tensor and a rank's part."""

    family: Family
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class FoldedParameter:
    """A parameter of the folded model under its name in the original one."""

    name: str
    parameter: nn.Parameter
    placement: Placement
    partial: bool = False
    """Replicated, but each lane's gradient covers its own heads only (a norm inside a head)."""

    @property
    def family(self) -> Family:
        """Family of the parameter."""
        return self.placement.family


class Rule(Enum):
    """How a family's local gradient becomes the objective's gradient.

    Local gradients are those of this lane's own loss, summed over micro-batches / gas. The sum
    over an axis divided by the divisor is the objective's gradient:

        AVERAGE           stage = tp x dp, / (tp dp)   replicated over lanes: mean of lanes, of dp
        SUM               stage = tp x dp, / dp        each lane holds a part (own tokens, heads)
        SKIP              dp,              / dp        sharded over lanes: each has its own weight
        EXPERT_TP_CANCEL  edp,             / (tp dp)   restore's factor tp undone, mean over dp
        EXPERT            edp,             / dp        no restore factor (own-token slices)
    """

    AVERAGE = "average"
    SUM = "sum"
    SKIP = "skip"
    EXPERT_TP_CANCEL = "expert_tp_cancel"
    EXPERT = "expert"

    def axis(self) -> str:
        """Name the group axis the gradient is summed over."""
        if self in (Rule.AVERAGE, Rule.SUM):
            return "stage"
        return "dp" if self is Rule.SKIP else "edp"

    def divisor(self, layout: FoldLayout) -> int:
        """Give the number the sum is divided by."""
        if self in (Rule.AVERAGE, Rule.EXPERT_TP_CANCEL):
            return layout.tp_size * layout.dp_size
        return layout.dp_size


def rule_of(placement: Placement, *, partial: bool = False) -> Rule:
    """Choose the rule of a parameter under strategy route_full."""
    if placement.family == "expert":
        return Rule.EXPERT_TP_CANCEL
    if any(shard.axis == "tp" for shard in placement.shards):
        return Rule.SKIP
    return Rule.SUM if partial else Rule.AVERAGE


def replicas(placement: Placement, layout: FoldLayout) -> int:
    """Count the ranks of a stage that hold the same part of a parameter."""
    sizes = {"tp": layout.tp_size, "ep": layout.ep_size, "etp": layout.etp_size}
    parts = 1
    for shard in placement.shards:
        parts *= sizes[shard.axis]
    return layout.stage_size // parts
