"""Where the parts of a model are: declared presets, and those of the known Hugging Face models.

Owns the names of modules and parameters in other people's models. Must not know tensors or ranks.
Easy to get wrong: a norm inside an attention head is replicated, yet each lane sees its own heads
only; such modules stand in `partial`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fold_impl.config import ConfigError


@dataclass(frozen=True)
class Preset:
    """Where the parts of a model are: regular expressions on module names, paths inside a block.

    moe: full name of a MoE block. router, experts, shared_experts: attribute of the block. gate,
    up, down: parameters of the experts module, stacked (E, F, H), (E, F, H), (E, H, F); up None:
    gate is the fused (E, 2F, H). column, row: ends of the names of linears cut by output, by
    input. regions: modules whose input feeds column-parallel linears only. attention: modules
    whose parameters are of that family. partial: replicated modules that see one lane's heads.
    tails: (linear, attribute of its parent that holds how many of its last outputs go to the heads
    unsharded). top_k None: the block's own gate gives (logits, weights, indices).
    """

    moe: str
    router: str
    experts: str
    gate: str
    up: str | None
    down: str
    top_k: int | None = None
    score: str = "softmax"
    normalize: bool = True
    shared_experts: str | None = None
    attention: str = r".*attn"
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    tails: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Preset:
        """Read a preset declared in a config.

        Raises:
            ConfigError: a key is unknown or missing.
        """
        known = set(cls.__dataclass_fields__)
        for key in table:
            if key not in known:
                raise ConfigError("unknown key", f"folding.preset.{key}", table[key], sorted(known))
        missing = {"moe", "router", "experts", "gate", "down"} - set(table)
        if missing:
            raise ConfigError("missing", f"folding.preset.{min(missing)}", None, "a name")
        listed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in table.items()
        }
        return cls(**{"up": None, **listed})


_HUGGING_FACE = {
    "moe": r"(?:.*\.)?layers\.\d+\.mlp",
    "router": "gate",
    "experts": "experts",
    "gate": "gate_up_proj",
    "up": None,
    "down": "down_proj",
    "attention": r".*\.self_attn",
}
_MLP_COLUMN = (r"mlp\.gate_proj", r"mlp\.up_proj")
_LATENT_ATTENTION = {
    **_HUGGING_FACE,
    "shared_experts": "shared_experts",
    "column": (
        r"self_attn\.q_proj",
        r"self_attn\.q_b_proj",
        r"self_attn\.kv_b_proj",
        *_MLP_COLUMN,
        r"shared_experts\.gate_proj",
        r"shared_experts\.up_proj",
    ),
    "row": (r"self_attn\.o_proj", r"mlp\.down_proj", r"shared_experts\.down_proj"),
    "regions": ("mlp", "shared_experts"),
    "tails": ((r"self_attn\.kv_a_proj_with_mqa", "qk_rope_head_dim"),),
}
_HEADS = {
    "column": (r"self_attn\.[qkv]_proj",),
    "row": (r"self_attn\.o_proj",),
    "regions": ("self_attn",),
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {**_HUGGING_FACE, **_HEADS},
    "qwen3_moe": {
        **_HUGGING_FACE,
        "column": (*_HEADS["column"], *_MLP_COLUMN),
        "row": (*_HEADS["row"], r"mlp\.down_proj"),
        "regions": ("self_attn", "mlp"),
        "partial": (r"self_attn\.[qk]_norm",),
    },
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": {**_LATENT_ATTENTION, "score": "sigmoid"},
}
"""`expert_parallel.preset_model` -> fields of `Preset`, as of transformers 5."""


def find_preset(name: str | None, declared: Mapping[str, Any] | None) -> Preset:
    """Give the declared preset, or the one of a known model.

    Raises:
        ConfigError: neither is given, or the name has no preset.
    """
    if declared is not None:
        return Preset.from_dict(declared)
    if name is not None and name in PRESETS:
        return Preset(**PRESETS[name])
    key = "expert_parallel.preset_model"
    raise ConfigError("no preset to find the MoE blocks", key, name, [*PRESETS, "folding.preset"])
