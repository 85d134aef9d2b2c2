"""Turn an ordinary model into a folded one: find its MoE blocks and linears, cut, replace.

Owns the reading of a preset and the cutting of weights. Must not know optimizers or collectives.
Easy to get wrong: a parameter keeps the name it had in the original model, whatever now holds it,
because checkpoints and comparisons speak in those names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from fold_impl.checks import SIZE_KEYS, check, moe_blocks
from fold_impl.checks import ends_with as _ends
from fold_impl.config import ConfigError
from fold_impl.dispatch import scatter_share
from fold_impl.experts import ExpertNames, RoutedExperts
from fold_impl.families import Family, FoldedParameter, Placement, Shard
from fold_impl.groups import FoldGroups, Group
from fold_impl.moe import FoldedMoE
from fold_impl.points import Points
from fold_impl.presets import Preset
from fold_impl.router import CORRECTION_BIAS, AuxiliaryOptions, Router, RouterOptions
from fold_impl.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedTailLinear,
    enter_region,
    leave_lanes,
)


def fold(
    model: nn.Module,
    preset: Preset,
    groups: FoldGroups,
    auxiliary: AuxiliaryOptions,
    points: Points,
) -> list[FoldedParameter]:
    """Replace MoE blocks and linears in place, keeping only this rank's parts.

    Args:
        model: full model, equal on every rank.
        preset: where its parts are.
        groups: communicators of this rank.
        auxiliary: losses the routers add.
        points: the engine's points.

    Returns:
        Every parameter of the folded model, in an order equal on all ranks.

    Raises:
        ConfigError: no MoE block, or a size does not divide.
    """
    check(model, preset, groups.layout)
    cuts: dict[str, tuple[Shard, ...]] = {}
    kinds: dict[str, Family] = {}
    for layer, name in enumerate(moe_blocks(model, preset)):
        block = model.get_submodule(name)
        folded = _fold_block(name, block, preset, groups, auxiliary, points, layer, cuts)
        _replace(model, name, folded)
        kinds[f"{name}.{preset.router}"] = "router"
        kinds[f"{name}.{preset.experts}"] = "expert"
        if preset.shared_experts is not None:
            kinds[f"{name}.{preset.shared_experts}"] = "shared_expert"
    _cut_linears(model, preset, groups, points, cuts)
    _fuse_norms(model)
    for name, module in list(model.named_modules()):
        if re.fullmatch(preset.attention, name):
            kinds.setdefault(name, "attention")
        elif isinstance(module, nn.Embedding):
            kinds.setdefault(name, "embedding")
        elif "norm" in type(module).__name__.lower():
            kinds[name] = "layernorm"
    return [
        FoldedParameter(
            name,
            parameter,
            Placement(_family(name, kinds), cuts.get(name, ())),
            partial=_ends(name.rpartition(".")[0], preset.partial),
        )
        for name, parameter in model.named_parameters()
    ]


def _family(name: str, kinds: Mapping[str, Family]) -> Family:
    """Give the family of the innermost module that has one."""
    parts = name.split(".")[:-1]
    for end in range(len(parts), 0, -1):
        if (kind := kinds.get(".".join(parts[:end]))) is not None:
            return kind
    return "dense"


def _fold_block(
    name: str,
    block: nn.Module,
    preset: Preset,
    groups: FoldGroups,
    auxiliary: AuxiliaryOptions,
    points: Points,
    layer: int,
    cuts: dict[str, tuple[Shard, ...]],
) -> FoldedMoE:
    router = block.get_submodule(preset.router)
    experts = block.get_submodule(preset.experts)
    names = ExpertNames(preset.gate, preset.up, preset.down)
    num_experts = experts.get_parameter(preset.gate).shape[0]
    local: dict[str, nn.Parameter] = {}
    for part, shards in _expert_cuts(preset):
        full_name = f"{name}.{preset.experts}.{part}"
        cuts[full_name] = shards
        local[part] = _part(experts.get_parameter(part), shards, groups, full_name)
    shared = block.get_submodule(preset.shared_experts) if preset.shared_experts else None
    if preset.top_k is not None:
        router = Router(
            router.get_parameter("weight"),
            getattr(router, "bias", None),
            getattr(router, CORRECTION_BIAS, None),
        )
    return FoldedMoE(
        router=router,
        experts=RoutedExperts(names, local, getattr(experts, "act_fn", nn.functional.silu)),
        shared=shared,
        num_experts=num_experts,
        options=RouterOptions(preset.top_k, preset.score, preset.normalize),
        auxiliary=auxiliary,
        groups=groups,
        points=points,
        layer=layer,
        names=(preset.router, preset.experts, preset.shared_experts),
    )


def _expert_cuts(preset: Preset) -> Iterator[tuple[str, tuple[Shard, ...]]]:
    by_expert = Shard("ep", 0)
    if preset.up is None:
        yield preset.gate, (by_expert, Shard("etp", 1, segments=2))
    else:
        yield preset.gate, (by_expert, Shard("etp", 1))
        yield preset.up, (by_expert, Shard("etp", 1))
    yield preset.down, (by_expert, Shard("etp", 2))


def _cut_linears(
    model: nn.Module,
    preset: Preset,
    groups: FoldGroups,
    points: Points,
    cuts: dict[str, tuple[Shard, ...]],
) -> None:
    regions = [
        name
        for name, module in model.named_modules()
        if _ends(name, preset.regions) and not isinstance(module, FoldedMoE)
    ]
    shared = tuple(
        f"{name}.{preset.shared_experts}."
        for name, module in model.named_modules()
        if isinstance(module, FoldedMoE)
    )
    for name in regions:
        enter_region(model.get_submodule(name), groups.tp, points)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        shards: dict[str, tuple[Shard, ...]]
        if _ends(name, preset.column):
            shards = {"weight": (Shard("tp", 0),), "bias": (Shard("tp", 0),)}
        elif _ends(name, preset.row):
            shards = {"weight": (Shard("tp", 1),), "bias": ()}
        elif tail := _tail(model, name, preset):
            own = dict(module.named_parameters(recurse=False))
            linear = SharedTailLinear(own["weight"], own.get("bias"), tail, groups.tp)
            _replace(model, name, linear)
            continue
        else:
            continue
        parts = {}
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}"
            cuts[full_name] = shards[key]
            parts[key] = _part(parameter, shards[key], groups, full_name)
        weight, bias = parts["weight"], parts.get("bias")
        new: nn.Module
        if _ends(name, preset.row):
            leave = scatter_share if name.startswith(shared) else leave_lanes
            new = RowParallelLinear(weight, bias, groups.tp, points, leave)
        else:
            inside = any(name.startswith(f"{region}.") for region in regions)
            new = ColumnParallelLinear(weight, bias, groups.tp, enters=not inside)
        _replace(model, name, new)


class FusedRMSNorm(nn.Module):
    """RMSNorm in one kernel: float32 inside and one rounding, where Hugging Face's rounds twice."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _fuse_norms(model: nn.Module) -> None:
    """Replace Hugging Face's eager RMSNorm, which every lane runs on all tokens."""
    for name, module in list(model.named_modules()):
        eps = getattr(module, "variance_epsilon", None)
        if eps is not None and type(module).__name__.endswith("RMSNorm"):
            _replace(model, name, FusedRMSNorm(module.get_parameter("weight"), eps))


def _tail(model: nn.Module, name: str, preset: Preset) -> int:
    """Give the width of the outputs that go to the heads without a column-parallel linear."""
    for pattern, attribute in preset.tails:
        if _ends(name, (pattern,)):
            return int(getattr(model.get_submodule(name.rpartition(".")[0]), attribute))
    return 0


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, new)


def _part(
    parameter: nn.Parameter, shards: tuple[Shard, ...], groups: FoldGroups, name: str
) -> nn.Parameter:
    """Keep this rank's part of a parameter, in memory of its own.

    A parameter that is not cut stays the same object, so tied weights stay tied.
    """
    if all(getattr(groups, shard.axis).size == 1 for shard in shards):
        return parameter
    part = parameter.detach()
    for shard in shards:
        part = cut(part, shard, getattr(groups, shard.axis), name)
    return nn.Parameter(part.clone(), requires_grad=parameter.requires_grad)


def cut(tensor: Tensor, shard: Shard, group: Group, name: str) -> Tensor:
    """Cut one dimension evenly over a group.

    Raises:
        ConfigError: the dimension does not divide.
    """
    size = tensor.shape[shard.dim]
    if size % (group.size * shard.segments):
        divisors = [d for d in range(1, size + 1) if size % (d * shard.segments) == 0]
        raise ConfigError(
            f"does not divide dimension {shard.dim} = {size} of {name}",
            SIZE_KEYS[shard.axis],
            group.size,
            divisors,
        )
    blocks: Tensor = tensor.unflatten(shard.dim, (shard.segments, group.size, -1))
    part: Tensor = blocks.select(shard.dim + 1, group.index)
    return part.flatten(shard.dim, shard.dim + 1)
