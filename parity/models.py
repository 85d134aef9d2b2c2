"""The small models that cases run on, with a MoE that is a naive loop over tokens.

Owns module structure, weights and the description of the structure (`PRESET`) an implementation may
use to find the parts. Must not know ranks, groups or any implementation. Easy to get wrong: a
hidden downcast (`.float()` in loss, router or norm) would cap every comparison at 6e-8.

Shapes: B sequences, S tokens each, T = B*S, H hidden, E experts, F expert width, K top_k, V vocab.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from parity import case as cases
from parity import hugging_face
from parity.hugging_face import Gate, HuggingFace
from parity.implementation import Family
from parity.template import Template

TIED_SCALE = 0.05
"""Size of the last norm's weight where the embedding is the head: at 1 the logits reach 60, a token
that predicts itself has the gradient p - 1 = -1e-8, and its only expert nothing but round-off."""


class Router(nn.Module):
    """Logits of every expert for every token: (T, H) -> (T, E)."""

    def __init__(self, spec: cases.Model) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.experts, spec.hidden))
        self.bias = nn.Parameter(torch.empty(spec.experts)) if spec.biases else None

    def forward(self, x_TH: Tensor) -> Tensor:
        """Compute the logits."""
        return F.linear(x_TH, self.weight, self.bias)


class Experts(nn.Module):
    """Stacked SwiGLU experts: w1, w3 (E, F, H) and w2 (E, H, F); y = w2 (silu(w1 x) * w3 x)."""

    def __init__(self, spec: cases.Model) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(spec.experts, spec.expert_width, spec.hidden))
        self.w3 = nn.Parameter(torch.empty(spec.experts, spec.expert_width, spec.hidden))
        self.w2 = nn.Parameter(torch.empty(spec.experts, spec.hidden, spec.expert_width))


class GatedMLP(nn.Module):
    """SwiGLU feed-forward block of width F: (..., H) -> (..., H)."""

    def __init__(self, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)
        self.w2 = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class MoE(nn.Module):
    """Token-choice MoE, one token and one expert at a time; the truth the harness trusts.

    After a forward `logits_TE` and `indices_TK` hold what the router said; `auxiliary` is zero here
    because the reference computes auxiliary losses over the scope the case asks for.
    """

    def __init__(self, spec: cases.Model) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(spec)
        self.experts = Experts(spec)
        self.shared = (
            GatedMLP(spec.hidden, spec.shared_width, spec.biases) if spec.shared_width else None
        )
        self.forced_TK: Tensor | None = None
        self.logits_TE = self.indices_TK = torch.empty(0)
        self.auxiliary: Tensor | float = 0.0

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Route every token to its K best experts and add up their weighted outputs."""
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        logits_TE = self.router(x_TH)
        chosen = (
            self.forced_TK
            if self.forced_TK is not None
            else best_experts(logits_TE, self.spec.top_k)
        )
        self.logits_TE, self.indices_TK = logits_TE, chosen
        weights_TK = scores(logits_TE, self.spec.score).gather(-1, chosen)
        if self.spec.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        w1, w3, w2 = (w.unbind(0) for w in (self.experts.w1, self.experts.w3, self.experts.w2))
        rows = []
        for x, weights, picks in zip(
            x_TH.unbind(0), weights_TK.unbind(0), chosen.tolist(), strict=True
        ):
            pairs = zip(weights.unbind(0), picks, strict=True)
            rows.append(sum(w * (w2[e] @ (F.silu(w1[e] @ x) * (w3[e] @ x))) for w, e in pairs))
        y_TH = torch.stack(rows)
        if self.shared is not None:
            y_TH = y_TH + self.shared(x_TH)
        return y_TH.reshape(x_BSH.shape)


def scores(logits_TE: Tensor, kind: str) -> Tensor:
    """Turn logits into routing scores: softmax over experts, or independent sigmoids."""
    return logits_TE.softmax(-1) if kind == "softmax" else logits_TE.sigmoid()


def best_experts(logits_TE: Tensor, top_k: int) -> Tensor:
    """Choose the top_k largest logits of each token, best first, the lowest index on a tie."""
    order = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices
    return order[:, :top_k]


class Attention(nn.Module):
    """Causal multi-head attention; the head count follows from the width of the projections."""

    def __init__(self, spec: cases.Model) -> None:
        super().__init__()
        self.head_dim = spec.hidden // spec.heads
        linear = [nn.Linear(spec.hidden, spec.hidden, bias=spec.biases) for _ in range(4)]
        self.q, self.k, self.v, self.o = linear

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Attend within each sequence."""
        b, s, _ = x_BSH.shape
        q, k, v = (
            p(x_BSH).view(b, s, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        logits = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        future = torch.ones(s, s, dtype=torch.bool, device=x_BSH.device).triu(1)
        y = logits.masked_fill(future, -math.inf).softmax(-1) @ v
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, s, -1))
        return out


class Block(nn.Module):
    """Attention, dense MLP and MoE, each behind its LayerNorm and added to the residual stream."""

    def __init__(self, spec: cases.Model) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(spec.hidden, bias=spec.biases)
        self.attention = Attention(spec)
        self.mlp_norm = nn.LayerNorm(spec.hidden, bias=spec.biases)
        self.mlp = GatedMLP(spec.hidden, spec.mlp_width, spec.biases)
        self.moe_norm = nn.LayerNorm(spec.hidden, bias=spec.biases)
        self.moe = MoE(spec)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Give the new residual stream and the MoE's own output (what a probe reads)."""
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        x_BSH = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        moe_BSH = self.moe(self.moe_norm(x_BSH))
        return x_BSH + moe_BSH, moe_BSH


class Tiny(nn.Module):
    """Decoder-only language model whose forward returns the scalar loss of one micro-batch."""

    def __init__(self, spec: cases.Model) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.hidden, bias=spec.biases)
        self.head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        if spec.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        loss_scale: float,
        probe: Tensor | None = None,
    ) -> Tensor:
        """Add up token losses, the probe of the MoE outputs and auxiliary losses.

        Args:
            input_ids: (B, S) int64.
            labels: (B, S) int64.
            loss_scale: factor on the summed token losses and on the probe.
            probe: (layers + 1, B, S, H), this lane's linear probe of every MoE output and, through
                the final norm alone, of the norm's output; or None.
        """
        x_BSH = self.embedding(input_ids)
        loss = x_BSH.new_zeros(())
        for index, block in enumerate(self.blocks()):
            x_BSH, moe_BSH = block(x_BSH)
            if probe is not None:
                loss = loss + (probe[index] * moe_BSH).sum()
        if probe is not None:  # a replicated norm whose gradient differs from lane to lane
            loss = loss + (probe[len(self.layers)] * self.norm(x_BSH.detach())).sum()
        logits = self.head(self.norm(x_BSH))
        loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        total: Tensor = loss * loss_scale + sum(block.moe.auxiliary for block in self.blocks())
        return total

    def blocks(self) -> list[Block]:
        """List the blocks in forward order."""
        return [block for block in self.layers if isinstance(block, Block)]


def build(spec: cases.Model, seed: int, *, idle_expert: bool, ties: bool = False) -> Tiny:
    """Make a float64 model whose weights depend on the arguments alone.

    With idle_expert every token embedding shares one direction that survives the norms; all router
    rows are orthogonal to it except the last expert's, which points against it: none chooses it.
    Queries and keys do not see the direction: a part of the attention logits that is common to all
    tokens cancels in softmax and leaves round-off (23 u where 13 u are had without it).

    With ties the logits of each group of three experts are one and the same entry of the router's
    input: equal in any dtype and any order of summation, as adding zeros is exact.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Tiny(spec).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(_initial(name, noise))
        if spec.tied:
            model.norm.weight.mul_(TIED_SCALE)
        if ties:
            _tie_experts(model)
        if idle_expert:
            _make_last_expert_idle(model, generator, ties)
    return model


def _initial(name: str, noise: Tensor) -> Tensor:
    if "norm" in name:
        return (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if "embedding" in name:
        return noise
    gain = 1.0 if "router" in name else 0.7  # at 2 a small routing weight is off by 50 u
    return gain * noise / math.sqrt(noise.shape[-1])


def _tie_experts(model: Tiny) -> None:
    """Let experts 3j, 3j + 1, 3j + 2 read entry j of the router's input and nothing else."""
    group = torch.arange(model.spec.experts) // cases.TIED
    for layer in moe_layers(model):
        layer.router.weight.copy_(F.one_hot(group, model.spec.hidden))
        if layer.router.bias is not None:
            layer.router.bias.copy_(layer.router.bias[group * cases.TIED])


def _make_last_expert_idle(model: Tiny, generator: torch.Generator, ties: bool) -> None:
    hidden = model.spec.hidden
    common = torch.randn(hidden, generator=generator, dtype=torch.float64)
    if ties:  # entries the router reads stay free of the direction
        common[: -(-model.spec.experts // cases.TIED)] = 0.0
    common = torch.where(common == 0.0, 0.0, common - common.sum() / (common != 0.0).sum())
    unit = common / common.norm()
    model.embedding.weight.add_(math.sqrt(hidden) * unit)
    for block in model.blocks():
        for blind in (block.moe.router, block.attention.q, block.attention.k):
            blind.weight.sub_(torch.outer(blind.weight @ unit, unit))
        block.moe.router.weight[-1] = -2.0 * unit


def build_for(case: cases.Case, seed: int) -> Tiny | HuggingFace:
    """Make the model of a case in float64."""
    if case.model.name == "tiny":
        data = case.data
        with _building:
            made = _template(case.model, seed, idle_expert=data.idle_expert, ties=data.ties)
        return made.copy()
    return hugging_face.build(
        case.model,
        seed,
        idle_expert=case.data.idle_expert,
        load_balance=case.auxiliary.load_balance,
    )


_building = threading.Lock()
"""Ranks that are threads ask at once for one model, which takes longer to draw than to copy."""


@functools.lru_cache(maxsize=4)
def _template(spec: cases.Model, seed: int, *, idle_expert: bool, ties: bool) -> Template[Tiny]:
    return Template(build(spec, seed, idle_expert=idle_expert, ties=ties))


def moe_layers(model: nn.Module) -> list[MoE]:
    """List the naive MoE layers in forward order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def gates(model: nn.Module) -> Sequence[MoE | Gate]:
    """List, in forward order, what remembers logits and choice of each MoE layer."""
    return model.gates if isinstance(model, HuggingFace) else moe_layers(model)


def force_routing(of: Sequence[MoE | Gate], routing: Sequence[Tensor | None]) -> None:
    """Make every MoE layer use the given (T, K) indices instead of its own choice."""
    for layer, indices_TK in zip(of, routing, strict=True):
        layer.forced_TK = indices_TK


def preset(spec: cases.Model) -> dict[str, Any]:
    """Describe the structure for an implementation: regular expressions on module names."""
    return {
        "moe": r"layers\.\d+\.moe",
        "router": "router",
        "experts": "experts",
        "gate": "w1",
        "up": "w3",
        "down": "w2",
        "shared_experts": "shared" if spec.shared_width else None,
        "top_k": spec.top_k,
        "score": spec.score,
        "normalize": spec.normalize,
        "attention": r"layers\.\d+\.attention",
        "column": [r"attention\.[qkv]", r"mlp\.w[13]", r"shared\.w[13]"],
        "row": [r"attention\.o", r"mlp\.w2", r"shared\.w2"],
        "regions": [r"layers\.\d+\.attention", r"layers\.\d+\.mlp", r"moe\.shared"],
    }


_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("norm", "layernorm"),
    ("router", "router"),
    ("experts", "expert"),
    ("shared", "shared_expert"),
    ("attention", "attention"),
    ("embedding", "embedding"),
)
"""Part of a parameter's name in the tiny model -> family; what has none is dense."""
LINEARS: Mapping[Family, str] = {
    "attention": r"\.(attention|self_attn)\.\w+\.weight$(?<!norm\.weight)",
    "dense": r"\.mlp\.(w[123]|(gate|up|down)_proj)\.weight$",
}
"""Family -> names of its matrices in the blocks of any model, of which tp is to cut some."""


def family_of(name: str) -> Family:
    """Give the family of a parameter of the tiny model."""
    return next((family for part, family in _FAMILIES if part in name), "dense")


def structural_zeros(spec: cases.Model, auxiliary: cases.Auxiliary) -> frozenset[str]:
    """Name the parameters whose true gradient is zero but for round-off.

    A key bias adds one number to all of a query's attention logits: softmax does not see it. With
    one expert a token and normalised weights the weight is w / w = 1: only auxiliary losses reach
    the router.
    """
    names = []
    if spec.name != "tiny":
        alone = spec.top_k == 1 and (spec.normalize or spec.name == "mixtral")
        if alone and not auxiliary.active and not spec.name.startswith("deepseek"):
            names = [f"{name}.gate.weight" for name in hugging_face.moe_names(spec)]
        return frozenset(names)
    for layer in range(spec.layers):
        if spec.biases:
            names.append(f"layers.{layer}.attention.k.bias")
        if spec.top_k == 1 and spec.normalize and not auxiliary.active:
            names.append(f"layers.{layer}.moe.router.weight")
            if spec.biases:
                names.append(f"layers.{layer}.moe.router.bias")
    return frozenset(names)


def moe_names(spec: cases.Model) -> list[str]:
    """Name the MoE layers in forward order."""
    if spec.name != "tiny":
        return hugging_face.moe_names(spec)
    return [f"layers.{layer}.moe" for layer in range(spec.layers)]
