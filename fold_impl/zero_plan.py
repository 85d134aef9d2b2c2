"""What DeepSpeed's engine is told about groups and families, so that each is reduced by its rule.

Owns the assignment of parameters to DeepSpeed's groups. Must not know its engine. Easy to get
wrong: DeepSpeed divides every gradient by the size of its data-parallel group, whatever the family.

The trick: the whole stage (tp * dp ranks) is DeepSpeed's data-parallel group.

    rule               summed over   DeepSpeed divides by   still owed
    AVERAGE            stage         tp dp                  1
    SUM                stage         tp dp                  tp
    SKIP               dp            tp dp                  tp
    EXPERT_TP_CANCEL   edp           tp dp                  1
    EXPERT             edp           tp dp                  tp

What is owed is put on the leaf by a tensor hook: linear, hence exact under any accumulation,
applied once per micro-batch before DeepSpeed sees the gradient, and without a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import groups as registry
from torch import nn

from fold_impl.families import FoldedParameter, Rule, rule_of
from fold_impl.groups import AXES, FoldGroups, Group, NewGroup
from fold_impl.layout import FoldLayout
from fold_impl.points import Points
from fold_impl.states import Grouping


@dataclass(frozen=True)
class Kind:
    """Parameters that DeepSpeed reduces over one group.

    name: None for its data-parallel group, else that of an "expert" group. DeepSpeed rebuilds the
    name of the largest one as ep_size_<int>, so no other spelling works.
    """

    name: str | None
    replicas: Group
    """Ranks that hold the same parts: what is summed over."""
    shards: Group
    """One rank of every distinct part: what DeepSpeed adds norms and overflows over."""


@dataclass(frozen=True)
class Member:
    """A folded parameter as DeepSpeed is to see it; `factor` is what the table above calls owed."""

    folded: FoldedParameter
    kind: Kind
    factor: float


class StageUnit:
    """What DeepSpeed asks an `mpu`: it reduces over the stage, and counts batches by dp.

    No model parallelism is visible, so nothing is filtered out of norms. The size of the
    data-parallel *world* feeds only the arithmetic of batch sizes and progress counters.
    """

    def __init__(self, stage: Group, dp_size: int, own: Group) -> None:
        self._stage, self._dp_size, self._own = stage, dp_size, own

    def get_data_parallel_group(self) -> Any:
        """Give the group gradients are reduced and optimizer states are divided over."""
        return self._stage.handle

    def get_data_parallel_world_size(self) -> int:
        """Give the number of ranks that see different samples."""
        return self._dp_size

    def get_data_parallel_rank(self) -> int:
        """Give this rank's place in the group."""
        return self._stage.index

    def get_model_parallel_group(self) -> Any:
        """Give this rank alone."""
        return self._own.handle

    def get_model_parallel_world_size(self) -> int:
        """Give 1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Give 0."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


@dataclass(frozen=True)
class Plan:
    """Everything DeepSpeed's engine is told about a folded model."""

    members: Sequence[Member]
    groups: FoldGroups
    stage: Group
    unit: StageUnit

    def kinds(self) -> list[Kind]:
        """List the kinds in use, in an order equal on all ranks."""
        return list({member.kind.name: member.kind for member in self.members}.values())

    def register(self) -> None:
        """Make these groups those of DeepSpeed's module, which keeps one set for all engines."""
        registry._release_process_group_references(None)
        registry._WORLD_GROUP = self.stage.handle
        registry.mpu = self.unit
        for kind in self.kinds():
            if kind.name is not None:
                registry._EXPERT_PARALLEL_GROUP[kind.name] = kind.shards.handle
                registry._EXPERT_PARALLEL_GROUP_RANKS[kind.name] = list(kind.shards.ranks)
                registry._EXPERT_DATA_PARALLEL_GROUP[kind.name] = kind.replicas.handle
                registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[kind.name] = list(kind.replicas.ranks)


def make_plan(
    parameters: Sequence[FoldedParameter], groups: FoldGroups, new_group: NewGroup, points: Points
) -> Plan:
    """Assign every parameter its kind and factor.

    Collective: every rank of the world calls it alike (it makes process groups).
    """
    layout, rank = groups.layout, groups.rank
    handles = _handles(groups, new_group)

    def group(ranks: tuple[int, ...]) -> Group:
        return Group(ranks, ranks.index(rank), handles[ranks])

    stage, own = group(groups.stage.ranks), group((rank,))
    model = group(layout.group_of("expert_model", rank))
    kinds = {
        "stage": Kind(None, stage, own),
        "dp": Kind("ep_size_0", group(groups.dp.ranks), group(groups.tp.ranks)),
        "edp": Kind(f"ep_size_{model.size}", group(groups.edp.ranks), model),
    }
    members = []
    for folded in parameters:
        rule: Rule = rule_of(folded.placement, partial=folded.partial)
        rule = points("reduce.rule", rule, name=folded.name, family=folded.family, layout=layout)
        kind = kinds[rule.axis()]
        if kind.replicas.size == stage.size:
            kind = kinds["stage"]
        factor = layout.tp_size * layout.dp_size / rule.divisor(layout)
        members.append(Member(folded, kind, factor))
    return Plan(members, groups, stage, StageUnit(stage, layout.dp_size, own))


def _handles(groups: FoldGroups, new_group: NewGroup) -> dict[tuple[int, ...], Any]:
    """Give a process group for every rank tuple DeepSpeed may be shown, singletons included.

    Where folding itself needs no communicator, None would mean the whole world to DeepSpeed.
    """
    layout, rank = groups.layout, groups.rank
    held = [getattr(groups, axis) for axis in AXES]
    handles = {group.ranks: group.handle for group in held if group.handle is not None}
    made = {ranks for axis in AXES for ranks in layout.groups(axis) if len(ranks) > 1}
    for ranks in (*layout.groups("expert_model"), *_singletons(layout)):
        if ranks not in made:
            made.add(ranks)
            handle = new_group(ranks)
            if rank in ranks:
                handles[ranks] = handle
    return handles


def _singletons(layout: FoldLayout) -> list[tuple[int, ...]]:
    return [(rank,) for rank in range(layout.world_size)]


def split_groups(optimizer: torch.optim.Optimizer, members: Sequence[Member]) -> Grouping:
    """Split the optimizer's groups so that each holds one kind, as DeepSpeed wants it.

    Frozen parameters leave; a group that would be empty is left out.

    Returns:
        Names in the groups there are now, and which given group each is a part of.
    """
    names = {id(member.folded.parameter): member.folded.name for member in members}
    kinds = {id(member.folded.parameter): member.kind.name for member in members}
    split, origin = [], []
    for place, group in enumerate(optimizer.param_groups):
        parts: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                parts.setdefault(kinds[id(parameter)], []).append(parameter)
        for name, part in parts.items():
            marks = {"name": "dense"} if name is None else {"name": name, "moe": True}
            split.append({**group, **marks, "params": part})
            origin.append(place)
    optimizer.param_groups[:] = split
    return Grouping([[names[id(p)] for p in group["params"]] for group in split], origin)
