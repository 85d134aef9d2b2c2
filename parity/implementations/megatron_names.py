"""Where the parameters of the tiny model are in Megatron-Core's, and how they are cut.

Owns names, views and placements. Must not know engines, groups or cases' options. Easy to get
wrong: queries, keys and values alternate head by head in one weight, gate and up are halves of
another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity import case as cases
from parity.implementation import Family, Placement, Shard
from parity.layout import Layout


@dataclass(frozen=True)
class Part:
    """A logical parameter, or one expert of it, inside one of Megatron's."""

    parameter: Any
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Megatron's tensor -> the part of it, as a view that can be written."""


@dataclass(frozen=True)
class Entry:
    """Where Megatron keeps this rank's piece of a logical parameter."""

    placement: Placement
    parts: tuple[Part, ...]
    """One; of routed experts one for each that is here."""

    def read(self, tensor_of: Callable[[Any], Tensor]) -> Tensor:
        """Copy this rank's piece out of the parameters, their gradients, or the like."""
        parts = [_matrix(part.view(tensor_of(part.parameter))) for part in self.parts]
        return torch.stack(parts) if self.placement.family == "expert" else parts[0].clone()

    def write(self, piece: Tensor) -> None:
        """Set this rank's piece of the parameter."""
        pieces = piece if self.placement.family == "expert" else piece.unsqueeze(0)
        for part, value in zip(self.parts, pieces, strict=True):
            view = part.view(part.parameter.data)
            view.copy_(value.reshape(view.shape))


def _matrix(tensor: Tensor) -> Tensor:
    """Merge the heads that a view of queries, keys or values keeps apart."""
    return tensor.flatten(0, 1) if tensor.dim() == 3 else tensor


def _entry(family: Family, parameter: Any, *shards: Shard) -> Entry:
    return Entry(Placement(family, shards), (Part(parameter),))


_ROWS, _COLUMNS = Shard("tp", 0), Shard("tp", 1)


def entries(model: Any, spec: cases.Model) -> dict[str, Entry]:
    """Find every logical parameter of the tiny model in Megatron's.

    Args:
        model: the GPTModel, two layers to a block.
        spec: of the tiny model.
    """
    found = {
        "embedding.weight": _entry("embedding", model.embedding.word_embeddings.weight, _ROWS),
        "norm.weight": _entry("layernorm", model.decoder.final_layernorm.weight),
    }
    if not spec.tied:
        found["head.weight"] = _entry("dense", model.output_layer.weight, _ROWS)
    for block in range(spec.layers):
        dense, sparse = model.decoder.layers[2 * block : 2 * block + 2]
        name, moe = f"layers.{block}", sparse.mlp
        for norm, module in (
            ("attention_norm", dense.input_layernorm),
            ("mlp_norm", dense.pre_mlp_layernorm),
            ("moe_norm", sparse.pre_mlp_layernorm),
        ):
            found[f"{name}.{norm}.weight"] = _entry("layernorm", module.weight)
        found |= _attention(f"{name}.attention", dense.self_attention, spec.hidden // spec.heads)
        found |= _mlp(f"{name}.mlp", "dense", dense.mlp)
        found[f"{name}.moe.router.weight"] = _entry("router", moe.router.weight)
        found |= _experts(f"{name}.moe.experts", moe.experts.local_experts)
        if spec.shared_width:
            found |= _mlp(f"{name}.moe.shared", "shared_expert", moe.shared_experts)
    return found


def _attention(name: str, module: Any, head_dim: int) -> dict[str, Entry]:
    found = {f"{name}.o.weight": _entry("attention", module.linear_proj.weight, _COLUMNS)}
    for index, letter in enumerate("qkv"):
        part = Part(module.linear_qkv.weight, _heads(index, head_dim))
        found[f"{name}.{letter}.weight"] = Entry(Placement("attention", (_ROWS,)), (part,))
    return found


def _mlp(name: str, family: Family, module: Any) -> dict[str, Entry]:
    found = {f"{name}.w2.weight": _entry(family, module.linear_fc2.weight, _COLUMNS)}
    for index, letter in enumerate(("w1", "w3")):
        part = Part(module.linear_fc1.weight, _nth(index, 2))
        found[f"{name}.{letter}.weight"] = Entry(Placement(family, (_ROWS,)), (part,))
    return found


def _experts(name: str, modules: Sequence[Any]) -> dict[str, Entry]:
    rows = Placement("expert", (Shard("ep", 0), Shard("etp", 1)))
    columns = Placement("expert", (Shard("ep", 0), Shard("etp", 2)))
    found = {f"{name}.w2": Entry(columns, tuple(Part(m.linear_fc2.weight) for m in modules))}
    for index, letter in enumerate(("w1", "w3")):
        parts = tuple(Part(m.linear_fc1.weight, _nth(index, 2)) for m in modules)
        found[f"{name}.{letter}"] = Entry(rows, parts)
    return found


def _nth(index: int, count: int) -> Callable[[Tensor], Tensor]:
    """Give one of the equal blocks of rows of a fused weight."""
    return lambda tensor: tensor.view(count, -1, tensor.shape[-1])[index]


def _heads(index: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    """Give queries, keys or values (heads, D, H) of a weight that has all three head by head."""
    return lambda tensor: tensor.view(-1, 3, head_dim, tensor.shape[-1])[:, index]


def piece_of(full: Tensor, placement: Placement, layout: Layout, rank: int) -> Tensor:
    """Cut a rank's piece out of a full logical tensor."""
    at = layout.coordinate(rank)
    for shard in placement.shards:
        full = full.chunk(getattr(layout, shard.axis), shard.dim)[getattr(at, shard.axis)]
    return full
