"""Losses of altered forwards: one that is exactly the loss a run had is what went wrong.

Owns the alterations of the naive MoE layers, and the watching of what is inside them. Must not
know causes or ranks. Easy to get wrong: routing is chosen anew in each altered forward, because
what is altered before a router changes what it chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from parity import models, reference
from parity.batches import StepBatches
from parity.case import Case

Watch = Callable[[int, str, Tensor], None]
"""(number of the MoE layer, what it is, tensor)."""
Weigh = Callable[[Tensor, Tensor], Tensor]
"""(scores of the chosen experts, weights they should have), both (T, K) -> weights to use."""


def matching(
    case: Case,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: StepBatches,
    tp: int,
    actual: float,
    tolerance: float,
) -> list[str]:
    """Name the alterations that give the loss a run had.

    Args:
        case: a case of the tiny model.
        model: structure.
        weights: full logical name -> weights before the step.
        batches: [dp rank][micro-batch].
        tp: lanes of the run.
        actual: loss the run had.
        tolerance: relative.
    """
    found = []
    for name, loss in _losses(case, model, weights, batches, tp):
        if abs(loss - actual) <= tolerance * abs(actual):
            found.append(name)
    return found


def _losses(
    case: Case, model: nn.Module, weights: Mapping[str, Tensor], batches: StepBatches, tp: int
) -> Iterator[tuple[str, float]]:
    spec = case.model
    ways: dict[str, Weigh] = {}
    if spec.top_k > 1 or not spec.normalize:
        ways["weights-squared"] = lambda _, due: due * due
        ways["weights-normalized"] = lambda _, due: due / due.sum(-1, keepdim=True)
        ways["weights-not-normalized"] = lambda scores, _: scores
    if spec.top_k > 1:
        ways["weights-flipped"] = lambda _, due: due.flip(-1)
    for name, weigh in ways.items():
        with altered(model, weigh=weigh):
            yield name, reference.loss(case, model, weights, batches)
    with altered(model, shift=1):
        yield "experts-shifted", reference.loss(case, model, weights, batches)
    if spec.shared_width and tp > 1:
        with altered(model, shared=float(tp)):
            yield "shared-times-tp", reference.loss(case, model, weights, batches)
    if spec.biases and tp > 1:
        often = {n: w * tp if _is_row_bias(n) else w for n, w in weights.items()}
        yield "bias-times-tp", reference.loss(case, model, often, batches)


def _is_row_bias(name: str) -> bool:
    """Tell the replicated bias of a linear whose partial outputs are summed over lanes."""
    return name.endswith((".o.bias", ".w2.bias"))


def paths(
    case: Case, model: nn.Module, weights: Mapping[str, Tensor], batches: StepBatches, name: str
) -> dict[str, Tensor]:
    """Split the gradient of a parameter right before a MoE layer over the layer's inputs.

    Args:
        case: a case of the tiny model.
        model: structure.
        weights: full logical name -> weights before the step.
        batches: [dp rank][micro-batch].
        name: parameter whose only way to the loss is that layer.

    Returns:
        Gradient through router, experts and (where there are any) shared experts alone; they add
        up to the whole.
    """
    kinds = ["router", "experts", *(["shared"] if case.model.shared_width else [])]
    found = {}
    for kind in kinds:
        with altered(model, alive=kind):
            found[kind] = reference.evaluate(case, model, weights, batches).gradients[name]
    return found


@torch.no_grad()
def router_inputs(
    model: nn.Module, weights: Mapping[str, Tensor], batches: StepBatches, name: str
) -> list[Tensor]:
    """Give the tokens (T, H) that a router sees, of each (dp rank, micro-batch)."""
    seen: list[Tensor] = []
    router = model.get_submodule(name.rpartition(".")[0])
    hook = router.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    wide = {n: w.detach().double() for n, w in weights.items()}
    try:
        for rank in batches:
            for batch in rank:
                functional_call(model, wide, (), dict(batch.for_mean(torch.float64)))
    finally:
        hook.remove()
    return seen


@contextmanager
def altered(
    model: nn.Module,
    *,
    weigh: Weigh | None = None,
    shift: int = 0,
    shared: float = 1.0,
    alive: str | None = None,
    watch: Watch | None = None,
) -> Iterator[None]:
    """Give every naive MoE layer another forward for a while.

    Args:
        model: holds the layers.
        weigh: other routing weights.
        shift: how many experts further a token goes.
        shared: factor on the shared expert's output.
        alive: router, experts or shared: the only part whose input carries a gradient.
        watch: called with layer, what and tensor: `tokens` (T, H) that enter router and experts,
            `rows` (T, K, H) that leave the experts, `output` (T, H) of the layer.
    """
    layers = models.moe_layers(model)
    for number, layer in enumerate(layers):
        see = functools.partial(watch, number) if watch is not None else _ignore
        vars(layer)["forward"] = _forward(layer, weigh, shift, shared, alive, see)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _forward(
    moe: models.MoE,
    weigh: Weigh | None,
    shift: int,
    shared: float,
    alive: str | None,
    see: Callable[[str, Tensor], None],
) -> Callable[[Tensor], Tensor]:
    """Compute a MoE layer at once over all tokens and experts, altered on request."""

    def forward(x_BSH: Tensor) -> Tensor:
        spec = moe.spec
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        routed_TH = x_TH.view_as(x_TH)
        see("tokens", routed_TH)
        parts = {"router": routed_TH, "experts": routed_TH, "shared": x_TH}
        into = {k: v if alive in (None, k) else v.detach() for k, v in parts.items()}
        moe.logits_TE = moe.router(into["router"])
        moe.indices_TK = models.best_experts(moe.logits_TE, spec.top_k)
        scores_TK = models.scores(moe.logits_TE, spec.score).gather(-1, moe.indices_TK)
        weights_TK = scores_TK / scores_TK.sum(-1, keepdim=True) if spec.normalize else scores_TK
        if weigh is not None:
            weights_TK = weigh(scores_TK, weights_TK)
        gate = torch.einsum("efh,th->etf", moe.experts.w1, into["experts"])
        up = torch.einsum("efh,th->etf", moe.experts.w3, into["experts"])
        y_ETH = torch.einsum("ehf,etf->eth", moe.experts.w2, F.silu(gate) * up)
        place_TK = (moe.indices_TK + shift) % spec.experts
        tokens = torch.arange(len(x_TH)).unsqueeze(1)
        y_TKH = y_ETH[place_TK, tokens]
        see("rows", y_TKH)
        y_TH = (y_TKH * weights_TK.unsqueeze(-1)).sum(1)
        if moe.shared is not None:
            y_TH = y_TH + shared * moe.shared(into["shared"])
        see("output", y_TH)
        return y_TH.reshape(x_BSH.shape)

    return forward


def _ignore(_what: str, _tensor: Tensor) -> None:
    """Watch nothing."""
