"""Tiny Hugging Face MoE models as cases, and the lifting of their hard-coded float32 casts.

Owns how such a model is made from a config (never downloaded), watched and evaluated in float64.
Must not know ranks or implementations. Easy to get wrong: their norms, softmaxes, rotary
embeddings and routers ask for float32 by name, so a float64 reference needs `lifted()` around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.overrides import TorchFunctionMode

from parity import case as cases

DENSE_FIRST = ("qwen3_moe", "deepseek_v2", "deepseek_v3")
"""Models whose first block has a dense MLP in the place of the experts."""
GROUPS = 4
"""Expert groups of the models that limit the choice to some of them."""
CHOSEN_GROUPS = 2


Answer = tuple[Tensor, Tensor, Tensor]
"""Of a gate: logits (T, E), weights of the chosen experts (T, K), chosen experts (T, K)."""


class Gate:
    """What a model's own gate said in the last forward.

    Attributes:
        logits_TE: (T, E).
        indices_TK: (T, K) chosen experts.
        forced_TK: experts to use instead of the gate's own choice, or None.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.logits_TE = self.indices_TK = torch.empty(0)
        self.forced_TK: Tensor | None = None
        module.register_forward_hook(self._watch)

    def _watch(self, _: nn.Module, __: Any, answer: Answer) -> Answer | None:
        self.logits_TE, _weights, self.indices_TK = answer
        if self.forced_TK is None:
            return None
        self.indices_TK = self.forced_TK
        return self._lifted(self.forced_TK), self._weights(self.forced_TK), self.forced_TK

    def _lifted(self, indices_TK: Tensor) -> Tensor:
        """Lift the forced experts' logits above all others by as little as does it.

        The load-balance loss chooses once more from the logits: it must find the same experts.
        """
        values_TE = self.logits_TE.detach()
        chosen_TE = torch.zeros_like(values_TE, dtype=torch.bool).scatter(-1, indices_TK, True)
        best_left = values_TE.masked_fill(chosen_TE, -math.inf).amax(-1, keepdim=True)
        above = torch.maximum(values_TE, best_left + 1e-9)
        return self.logits_TE + torch.where(chosen_TE, above - values_TE, 0.0)

    def _weights(self, indices_TK: Tensor) -> Tensor:
        """Weigh experts as the gates of Mixtral and Qwen3-MoE do: softmax over all experts."""
        limited = getattr(self.module, "num_group", None)
        assert not limited, "a choice limited to groups of experts is not forced"
        assert self._softmax, "sigmoid scores are not forced"
        weights_TK = self.logits_TE.softmax(-1).gather(-1, indices_TK)
        if getattr(self.module, "norm_topk_prob", True):
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK

    def margin(self) -> float:
        """Give a lower bound of the change of a logit that would change the choice of a token.

        Scores (softmax or sigmoid) move by at most a quarter of what logits do, sums of two scores
        by half: four times the smallest gap between scores, twice that between group sums.
        """
        if self.forced_TK is not None:
            return self._forced_margin()
        scores = self._scores()
        groups = getattr(self.module, "num_group", None) or 1
        gaps = []
        if groups > 1:
            parts = scores.unflatten(-1, (groups, -1))
            sums = parts.max(-1).values if self._softmax else parts.topk(2, dim=-1).values.sum(-1)
            ordered = sums.sort(dim=-1, descending=True)
            kept = int(self.module.topk_group)  # type: ignore[arg-type]  # an attribute of theirs
            gaps.append(2 * (ordered.values[:, kept - 1] - ordered.values[:, kept]))
            allowed = torch.zeros_like(sums).scatter(1, ordered.indices[:, :kept], 1.0)
            mask = allowed.bool().unsqueeze(-1).expand_as(parts).flatten(1)
            scores = scores.masked_fill(~mask, -math.inf)
        top_k = self.indices_TK.shape[1]
        ordered_scores = scores.sort(dim=-1, descending=True).values
        gaps.append(4 * (ordered_scores[:, top_k - 1] - ordered_scores[:, top_k]))
        return float(torch.stack([gap.min() for gap in gaps]).min())

    def _forced_margin(self) -> float:
        """Give by how much the forced experts lead; below 0: by how much another one does."""
        chosen = torch.zeros_like(self.logits_TE, dtype=torch.bool)
        chosen = chosen.scatter(-1, self.indices_TK, True)
        logits = self.logits_TE.detach()
        worst = logits.masked_fill(~chosen, math.inf).amin(-1)
        best_left = logits.masked_fill(chosen, -math.inf).amax(-1)
        return float((worst - best_left).min())

    @property
    def _softmax(self) -> bool:
        return not hasattr(self.module, "e_score_correction_bias")

    def _scores(self) -> Tensor:
        logits = self.logits_TE.detach()
        if self._softmax:
            return logits.softmax(-1)
        return logits.sigmoid() + self.module.get_buffer("e_score_correction_bias")


class HuggingFace(nn.Module):
    """A causal language model of transformers; forward returns the scalar loss of a micro-batch."""

    def __init__(self, spec: cases.Model, load_balance: float) -> None:
        super().__init__()
        self.spec, self.load_balance = spec, load_balance
        self.model = _make(spec)
        self.gates = [Gate(self.get_submodule(f"{name}.gate")) for name in moe_names(spec)]

    def forward(
        self, input_ids: Tensor, labels: Tensor, loss_scale: float, probe: None = None
    ) -> Tensor:
        """Add up token losses and the model's own load-balance loss.

        Args:
            input_ids: (B, S) int64.
            labels: (B, S) int64.
            loss_scale: factor on the summed token losses.
            probe: not offered by these models.
        """
        assert probe is None, "a lane-varying consumer is offered by the tiny model only"
        asked = {"output_router_logits": True} if self.load_balance else {}
        answer = self.model(input_ids=input_ids, use_cache=False, **asked)
        loss = F.cross_entropy(answer.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total: Tensor = loss * loss_scale
        if self.load_balance:
            total = total + self.load_balance * answer.aux_loss
        return total


def moe_names(spec: cases.Model) -> list[str]:
    """Name the MoE blocks in forward order."""
    first = 1 if spec.name in DENSE_FIRST else 0
    return [f"model.model.layers.{layer}.mlp" for layer in range(first, spec.layers)]


def _make(spec: cases.Model) -> nn.Module:
    import transformers

    classes: dict[str, tuple[Any, Any]] = {
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
        "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    }
    config, model = classes[spec.name]
    made: nn.Module = model(config(**_sizes(spec)))
    return made


def _sizes(spec: cases.Model) -> dict[str, Any]:
    """Give the keyword arguments of the model's config."""
    common = {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.heads,
        "vocab_size": spec.vocab,
        "num_experts_per_tok": spec.top_k,
        "max_position_embeddings": 64,
        "tie_word_embeddings": spec.tied,
        "attn_implementation": "eager",
        "experts_implementation": "eager",  # the grouped product knows no float64
    }
    if spec.name == "mixtral":
        sizes = {"intermediate_size": spec.expert_width, "num_local_experts": spec.experts}
        return {**common, **sizes}
    common |= {"intermediate_size": spec.mlp_width, "moe_intermediate_size": spec.expert_width}
    if spec.name == "qwen3_moe":
        return {
            **common,
            "num_experts": spec.experts,
            "head_dim": 8,
            "norm_topk_prob": spec.normalize,
            "mlp_only_layers": [0],
        }
    return {
        **common,
        "n_routed_experts": spec.experts,
        "n_shared_experts": 1,
        "n_group": GROUPS,
        "topk_group": CHOSEN_GROUPS,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "norm_topk_prob": spec.normalize,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }


def build(
    spec: cases.Model, seed: int, *, idle_expert: bool, load_balance: float = 0.0
) -> HuggingFace:
    """Make a float64 model whose weights depend on the spec and the seed alone.

    The idle expert is made as in the tiny model: one direction shared by all embeddings, which the
    gate's last row points against.
    """
    generator = torch.Generator().manual_seed(seed)
    model = HuggingFace(spec, load_balance).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(_initial(name, noise))
        if idle_expert:
            _make_last_expert_idle(model, generator)
    return model


def _initial(name: str, noise: Tensor) -> Tensor:
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if "embed" in name:
        return noise
    return (2.0 if name.endswith("gate.weight") else 0.7) * noise / math.sqrt(noise.shape[-1])


def _make_last_expert_idle(model: HuggingFace, generator: torch.Generator) -> None:
    hidden = model.spec.hidden
    unit = torch.randn(hidden, generator=generator, dtype=torch.float64)
    unit = unit / unit.norm()
    model.get_parameter("model.model.embed_tokens.weight").add_(math.sqrt(hidden) * unit)
    for gate in model.gates:
        weight = gate.module.get_parameter("weight")
        weight.sub_(torch.outer(weight @ unit, unit))
        weight[-1] = -2.0 * unit


class _Lift(TorchFunctionMode):
    """Turn every request for float32 into one for float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@contextmanager
def lifted() -> Iterator[None]:
    """Evaluate in float64 what asks for float32 by name."""
    with _Lift():
        yield
