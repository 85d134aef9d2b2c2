"""Whether a model can be folded as asked: every refusal, before anything is changed or created.

Owns the reading of a model's sizes against a preset and a layout. Must not know groups or change
the model. Easy to get wrong: what a preset does not name would vanish silently with the block that
folding replaces, so a block is refused unless every parameter and buffer of it has a place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from fold_impl.config import ConfigError
from fold_impl.layout import FoldLayout, divisors
from fold_impl.presets import Preset
from fold_impl.router import CORRECTION_BIAS

SIZE_KEYS = {
    "tp": "tensor_parallel.autotp_size",
    "ep": "expert_parallel.autoep_size",
    "etp": "expert_parallel.expert_tensor_parallel_size",
}


def ends_with(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether the end of a dotted name matches one of the patterns."""
    return any(re.search(rf"(^|\.)(?:{pattern})$", name) for pattern in patterns)


def moe_blocks(model: nn.Module, preset: Preset) -> list[str]:
    """Name the MoE blocks in forward order."""
    return [
        name
        for name, module in model.named_modules()
        if re.fullmatch(preset.moe, name) and hasattr(module, preset.experts)
    ]


def check(model: nn.Module, preset: Preset, layout: FoldLayout) -> None:
    """Refuse a model that cannot be folded; it is left as it was.

    Raises:
        ConfigError: no MoE block, a size that does not divide, a part no rule names, tied weights
            of which one would be cut, or tensor parallelism that cuts nothing.
    """
    blocks = moe_blocks(model, preset)
    if not blocks:
        problem = f"no module of {type(model).__name__} is a MoE block by"
        allowed = "a model with MoE blocks, or the preset of this model"
        raise ConfigError(problem, "folding.preset.moe", preset.moe, allowed)
    for name in blocks:
        _check_block(name, model.get_submodule(name), preset, layout)
    if layout.tp_size > 1:
        _check_heads(model, preset, layout)
        _check_linears(model, preset, layout)


def _check_block(name: str, block: nn.Module, preset: Preset, layout: FoldLayout) -> None:
    if jitter := getattr(block, "jitter_noise", 0.0):
        raise ConfigError("not supported", f"{name}.jitter_noise", jitter, [0.0])
    for part in _unknown_parts(block, preset):
        allowed = "parts of router, experts and shared experts that folding.preset names"
        raise ConfigError("has no place in a folded block", "folding.preset", part, allowed)
    experts = block.get_submodule(preset.experts)
    for part in filter(None, (preset.gate, preset.up, preset.down)):
        weight, full_name = experts.get_parameter(part), f"{name}.{preset.experts}.{part}"
        _divides("ep", layout.ep_size, weight, 0, 1, full_name)
        segments = 2 if part == preset.gate and preset.up is None else 1
        dim = 2 if part == preset.down else 1
        _divides("etp", layout.etp_size, weight, dim, segments, full_name)


def _unknown_parts(block: nn.Module, preset: Preset) -> Iterator[str]:
    known = {f"{preset.experts}.{part}" for part in (preset.gate, preset.up, preset.down)}
    whole = [preset.shared_experts] if preset.shared_experts else []
    if preset.top_k is None:
        whole.append(preset.router)
    else:
        known |= {f"{preset.router}.{part}" for part in ("weight", "bias", CORRECTION_BIAS)}
    for name, _ in (*block.named_parameters(), *block.named_buffers()):
        if name not in known and not any(name.startswith(f"{part}.") for part in whole):
            yield name


def _divides(axis: str, size: int, weight: Tensor, dim: int, segments: int, name: str) -> None:
    length = weight.shape[dim]
    if length % (size * segments):
        fitting = [d for d in divisors(length) if length % (d * segments) == 0]
        problem = f"does not divide dimension {dim} = {length} of {name}"
        raise ConfigError(problem, SIZE_KEYS[axis], size, fitting)


def _check_heads(model: nn.Module, preset: Preset, layout: FoldLayout) -> None:
    """Refuse head counts that the lanes cannot share; an even cut may still split a head."""
    for name, module in model.named_modules():
        sizes = getattr(module, "config", None)
        if not re.fullmatch(preset.attention, name) or sizes is None:
            continue
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(sizes, key, layout.tp_size)
            if heads % layout.tp_size:
                problem = f"does not divide {key} = {heads} of {name}"
                raise ConfigError(problem, SIZE_KEYS["tp"], layout.tp_size, divisors(heads))


def _check_linears(model: nn.Module, preset: Preset, layout: FoldLayout) -> None:
    cut: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for patterns, dim in ((preset.column, 0), (preset.row, 1)):
                if ends_with(name, patterns):
                    _divides("tp", layout.tp_size, module.weight, dim, 1, f"{name}.weight")
                    cut.add(f"{name}.weight")
    if not cut and any(isinstance(module, nn.Linear) for module in model.modules()):
        problem = "no linear of the model is named by column or row of its preset, at"
        raise ConfigError(problem, SIZE_KEYS["tp"], layout.tp_size, [1])
    _check_tied(model, cut)
    for block in moe_blocks(model, preset):
        inside = f"{block}.{preset.shared_experts}."
        rows = [name for name in cut if name.startswith(inside) and _is_row(name, preset)]
        if preset.shared_experts and not rows:
            problem = "no linear of the shared experts is cut by row in"
            allowed = "a preset whose `row` names their last linear"
            raise ConfigError(problem, "folding.preset.row", block, allowed)


def _is_row(weight: str, preset: Preset) -> bool:
    return ends_with(weight.rpartition(".")[0], preset.row)


def _check_tied(model: nn.Module, cut: set[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(tied) > 1 and cut & set(tied):
            problem = f"would cut one of the tied weights {' and '.join(tied)}"
            allowed = "patterns that leave tied weights whole"
            raise ConfigError(problem, "folding.preset", min(cut & set(tied)), allowed)
