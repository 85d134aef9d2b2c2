"""Tiny Hugging Face MoE models as cases, and the lifting of their hard-coded float32 casts.

Owns how such a model is made from a config (never downloaded), watched and evaluated in float64.
Must not know ranks or implementations. Easy to get wrong: their norms, softmaxes, rotary
embeddings and routers ask for float32 by name, so a float64 reference needs `lifted()` around it.
"""

from __future__ import annotations

import itertools
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
CORRECTION_BIAS = "e_score_correction_bias"
"""Buffer of a router of sigmoid scores, added to those that experts are chosen by."""


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
        """Weigh experts as the models' gates do: by their scores, normalised and scaled or not."""
        weights_TK = self._scores(self.logits_TE).gather(-1, indices_TK)
        scaled = hasattr(self.module, "routed_scaling_factor")
        if getattr(self.module, "norm_topk_prob", not scaled):  # DeepSeek-V2 has no such switch
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if scaled:
            weights_TK = weights_TK * self.module.routed_scaling_factor  # type: ignore[operator]
        return weights_TK

    def margin(self) -> float:
        """Give by how many logits the choice leads at least; below 0: another one leads by more.

        What comes of a softmax is in the order of the logits. Sigmoids move by at most a quarter
        of what logits do, sums of two by half. Of the groups that may have been kept, those count
        that speak most for the choice.
        """
        groups = int(getattr(self.module, "num_group", None) or 1)
        kept = int(getattr(self.module, "topk_group", None) or 1)
        values = self.logits_TE.detach()
        chosen = torch.zeros_like(values, dtype=torch.bool).scatter(-1, self.indices_TK, True)
        if self._softmax:
            of_expert = of_group = 1.0
            group_values = values.unflatten(-1, (groups, -1)).amax(-1)
        else:
            of_expert, of_group = 4.0, 2.0
            values = self._scores(values) + self.module.get_buffer(CORRECTION_BIAS)
            group_values = values.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
        leads = []
        for some in itertools.combinations(range(groups), kept):
            inside = torch.zeros(groups, dtype=torch.bool)
            inside[list(some)] = True
            allowed = inside.repeat_interleave(values.shape[-1] // groups)
            group_lead = of_group * _lead(group_values, inside.expand_as(group_values))
            lead = of_expert * _lead(values.masked_fill(~allowed, -math.inf), chosen)
            leads.append(torch.minimum(group_lead, lead))
        return float(torch.stack(leads).amax(0).min())

    @property
    def _softmax(self) -> bool:
        return not hasattr(self.module, CORRECTION_BIAS)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self._softmax else logits_TE.sigmoid()


def _lead(values: Tensor, chosen: Tensor) -> Tensor:
    """Subtract the largest value left out from the smallest chosen, along the last axis."""
    worst = values.masked_fill(~chosen, math.inf).amin(-1)
    return worst - values.masked_fill(chosen, -math.inf).amax(-1)


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
