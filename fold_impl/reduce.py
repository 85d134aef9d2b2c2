"""Local gradients -> the objective's gradients, in a few flat collectives; and their global norm.

Owns every gradient collective of the native engine. Must not know modules or optimizers. Easy to
get wrong: it runs once per step, after the last micro-batch, on every rank alike; a parameter
without a gradient on this rank still takes part, with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fold_impl.config import BUCKET_NUMEL
from fold_impl.families import FoldedParameter, Rule, replicas, rule_of
from fold_impl.groups import FoldGroups, Group
from fold_impl.layout import FoldLayout
from fold_impl.points import Points


@dataclass(frozen=True)
class _Bucket:
    rule: Rule
    members: list[FoldedParameter]


def reduce_gradients(
    parameters: Sequence[FoldedParameter],
    groups: FoldGroups,
    points: Points,
    bucket_numel: int = BUCKET_NUMEL,
) -> None:
    """Replace every `.grad` by the objective's gradient, by the rule of its family.

    Groups: stage for AVERAGE, dp for SKIP, edp for experts. Forward only. Factor: see
    `families.Rule`. Who must call: every rank of the stage, with parameters in the same order.
    """
    for bucket in _buckets(parameters, groups.layout, points, bucket_numel):
        gradients = [_gradient(member, points, groups.layout) for member in bucket.members]
        group: Group = getattr(groups, bucket.rule.axis())
        flat = torch.cat([g.flatten() for g in gradients])
        flat = points("reduce.bucket", flat, rule=bucket.rule, members=bucket.members)
        if group.handle is not None:
            dist.all_reduce(flat, group=group.handle)
        flat.div_(bucket.rule.divisor(groups.layout))
        parts = flat.split([g.numel() for g in gradients])
        for member, part in zip(bucket.members, parts, strict=True):
            reduced = part.view_as(member.parameter)
            member.parameter.grad = points(
                "reduce.reduced", reduced, **_facts(member, groups.layout)
            )


def _buckets(
    parameters: Sequence[FoldedParameter], layout: FoldLayout, points: Points, limit: int
) -> Iterator[_Bucket]:
    """Group parameters of one rule and dtype, at most `limit` elements together."""
    kinds: dict[tuple[Rule, torch.dtype], list[FoldedParameter]] = {}
    for member in parameters:
        rule = rule_of(member.placement, partial=member.partial)
        rule = points("reduce.rule", rule, **_facts(member, layout))
        kinds.setdefault((rule, member.parameter.dtype), []).append(member)
    for (rule, _), members in kinds.items():
        start = numel = 0
        for index, member in enumerate(members):
            if index > start and numel + member.parameter.numel() > limit:
                yield _Bucket(rule, members[start:index])
                start, numel = index, 0
            numel += member.parameter.numel()
        yield _Bucket(rule, members[start:])


def _gradient(member: FoldedParameter, points: Points, layout: FoldLayout) -> Tensor:
    gradient = member.parameter.grad
    if gradient is None:
        gradient = torch.zeros_like(member.parameter)
    passed: Tensor = points("reduce.gradient", gradient, **_facts(member, layout))
    return passed


def _facts(member: FoldedParameter, layout: FoldLayout) -> dict[str, Any]:
    return {"name": member.name, "family": member.family, "layout": layout}


def global_norm(parameters: Sequence[FoldedParameter], groups: FoldGroups, points: Points) -> float:
    """Compute the norm of the whole model's gradient, every distinct shard counted once.

    Each rank adds its squares divided by the number of ranks that hold the same part, so one
    all-reduce over the stage gives the sum over distinct shards, whichever lanes they sit on.
    Who must call: every rank of the stage, after `reduce_gradients`.
    """
    total: Tensor | None = None
    for member in parameters:
        if member.parameter.grad is None:
            continue
        norm = torch.linalg.vector_norm(member.parameter.grad, dtype=torch.float64)
        copies = replicas(member.placement, groups.layout)
        square = norm.square() / copies
        square = points("norm.square", square, copies=copies, **_facts(member, groups.layout))
        total = square if total is None else total + square
    if total is None:
        return 0.0
    if groups.stage.handle is not None:
        points("norm.reduce", dist.all_reduce)(total, group=groups.stage.handle)
    result: float = points("norm.total", math.sqrt(float(total)), groups=groups)
    return result


def clip_coefficient(norm: float, limit: float) -> float:
    """Give the factor that brings the norm down to the limit: min(1, limit / (norm + 1e-6)).

    The 1e-6 is torch's and DeepSpeed's. A limit of 0 switches clipping off.
    """
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
