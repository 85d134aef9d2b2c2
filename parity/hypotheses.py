"""Losses of altered forwards: one that is exactly the loss a run had is what went wrong.

Owns the list of alterations that a naive forward can be given. Must not know causes or ranks. Easy
to get wrong: routing is chosen anew in each altered forward, because what is altered before a
router changes what it chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from parity import models, reference
from parity.batches import StepBatches
from parity.case import Case

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
        with _altered(model, weigh=weigh):
            yield name, reference.loss(case, model, weights, batches)
    with _altered(model, shift=1):
        yield "experts-shifted", reference.loss(case, model, weights, batches)
    if spec.shared_width and tp > 1:
        with _altered(model, shared=float(tp)):
            yield "shared-times-tp", reference.loss(case, model, weights, batches)
    if spec.biases and tp > 1:
        often = {n: w * tp if _is_row_bias(n) else w for n, w in weights.items()}
        yield "bias-times-tp", reference.loss(case, model, often, batches)


def _is_row_bias(name: str) -> bool:
    """Tell the replicated bias of a linear whose partial outputs are summed over lanes."""
    return name.endswith((".o.bias", ".w2.bias"))


@contextmanager
def _altered(
    model: nn.Module, *, weigh: Weigh | None = None, shift: int = 0, shared: float = 1.0
) -> Iterator[None]:
    """Give every naive MoE layer another forward for a while."""
    layers = models.moe_layers(model)
    for layer in layers:
        vars(layer)["forward"] = _forward(layer, weigh, shift, shared)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _forward(
    moe: models.MoE, weigh: Weigh | None, shift: int, shared: float
) -> Callable[[Tensor], Tensor]:
    """Compute a MoE layer at once over all tokens and experts, altered on request."""

    def forward(x_BSH: Tensor) -> Tensor:
        spec = moe.spec
        x_TH = x_BSH.reshape(-1, x_BSH.shape[-1])
        moe.logits_TE = moe.router(x_TH)
        moe.indices_TK = models.best_experts(moe.logits_TE, spec.top_k)
        scores_TK = models.scores(moe.logits_TE, spec.score).gather(-1, moe.indices_TK)
        weights_TK = scores_TK / scores_TK.sum(-1, keepdim=True) if spec.normalize else scores_TK
        if weigh is not None:
            weights_TK = weigh(scores_TK, weights_TK)
        gate = torch.einsum("efh,th->etf", moe.experts.w1, x_TH)
        up = torch.einsum("efh,th->etf", moe.experts.w3, x_TH)
        y_ETH = torch.einsum("ehf,etf->eth", moe.experts.w2, F.silu(gate) * up)
        place_TK = (moe.indices_TK + shift) % spec.experts
        tokens = torch.arange(len(x_TH)).unsqueeze(1)
        y_TH = (y_ETH[place_TK, tokens] * weights_TK.unsqueeze(-1)).sum(1)
        if moe.shared is not None:
            y_TH = y_TH + shared * moe.shared(x_TH)
        return y_TH.reshape(x_BSH.shape)

    return forward
