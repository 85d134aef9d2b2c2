"""The oracle: one process, float64, whole batch, naive code; shares nothing with what it judges.

Owns the objective (token losses, probes, auxiliary losses over their scope) and its true gradients.
Must not know ranks or implementations. Easy to get wrong: the objective is the *mean* over dp
ranks and micro-batches of the micro-batch losses, whose loss_scale already carries dp * gas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from parity import batches as data
from parity import models
from parity.case import Auxiliary, Case
from parity.hugging_face import CORRECTION_BIAS, Gate, lifted

DTYPE = torch.float64
AUXILIARY = ("load_balance", "z_loss")
"""Auxiliary losses, named as their coefficients in `parity.case.Auxiliary`."""


@dataclass(frozen=True)
class Evaluation:
    """Truth of one step: objective, full gradients, routing and how safe the routing is.

    gradients: full logical name -> float64. routing: [dp rank][micro-batch][layer] -> (T, K).
    margin: smallest lead of any token's choice in logits, at least; below 0 where a forced choice
    trails; exact ties of a case that declares them are no gap.
    """

    loss: float
    gradients: dict[str, Tensor]
    routing: list[list[list[Tensor]]]
    margin: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole gradient."""
        return float(torch.stack([g.square().sum() for g in self.gradients.values()]).sum().sqrt())


def evaluate(
    case: Case,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: data.StepBatches,
    replay: Sequence[Sequence[Sequence[Tensor]]] | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> Evaluation:
    """Run the whole step's batch at the given weights in one process.

    Args:
        case: the case, for its auxiliary losses.
        model: structure; its own weights are not used.
        weights: full logical name -> any float dtype, taken to float64 as they are.
        batches: [dp rank][micro-batch].
        replay: routing to force, in the form of `Evaluation.routing`.
        biases: correction biases of the routers by name; None: as they are in the model.
    """
    leaves = {name: w.detach().to(DTYPE).requires_grad_() for name, w in weights.items()}
    lift = lifted() if case.model.name != "tiny" else nullcontext()
    with lift, _biased(model, biases or {}):
        shares = _shares(case, model, leaves, batches, replay)
    objective = shares.objective
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    return Evaluation(
        loss=float(objective.detach()),
        gradients={
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        },
        routing=shares.routing,
        margin=shares.margin,
    )


def biases_after(case: Case, model: nn.Module, steps: Sequence[Evaluation]) -> dict[str, Tensor]:
    """Give the routers' correction biases that the loads of some steps have led to.

    After each step b_e += rate * sign(mean load - load of e), every choice of every token of the
    step counted one by one (Wang et al. 2024, arXiv:2408.15664, algorithm 1). Empty at rate 0.
    """
    rate = case.correction_bias_rate
    found = {n: b.clone() for n, b in model.named_buffers() if rate and n.endswith(CORRECTION_BIAS)}
    for step in steps:
        for layer, bias in enumerate(found.values()):
            load: Counter[int] = Counter()
            for chosen in (layers[layer] for rank in step.routing for layers in rank):
                load.update(chosen.flatten().tolist())
            mean = sum(load.values()) / len(bias)
            for expert in range(len(bias)):
                bias[expert] += rate * ((load[expert] < mean) - (load[expert] > mean))
    return found


@contextmanager
def _biased(model: nn.Module, biases: Mapping[str, Tensor]) -> Iterator[None]:
    """Put correction biases into a model for a while: its gates read them outside a forward too."""
    buffers = dict(model.named_buffers())
    before = {name: buffers[name].clone() for name in biases}
    for name, bias in biases.items():
        buffers[name].copy_(bias)
    try:
        yield
    finally:
        for name, bias in before.items():
            buffers[name].copy_(bias)


@torch.no_grad()
def loss(
    case: Case, model: nn.Module, weights: Mapping[str, Tensor], batches: data.StepBatches
) -> float:
    """Evaluate the objective alone, as `evaluate` does."""
    return float(_forward(case, model, weights, batches).objective)


@torch.no_grad()
def routing(
    case: Case, model: nn.Module, weights: Mapping[str, Tensor], batches: data.StepBatches
) -> list[list[list[Tensor]]]:
    """Choose the experts alone, as `evaluate` does."""
    return _forward(case, model, weights, batches).routing


def _forward(
    case: Case, model: nn.Module, weights: Mapping[str, Tensor], batches: data.StepBatches
) -> _Shares:
    wide = {name: w.detach().to(DTYPE) for name, w in weights.items()}
    with lifted() if case.model.name != "tiny" else nullcontext():
        return _shares(case, model, wide, batches, None)


@dataclass
class _Shares:
    objective: Tensor
    routing: list[list[list[Tensor]]]
    margin: float


def _shares(
    case: Case,
    model: nn.Module,
    leaves: Mapping[str, Tensor],
    batches: data.StepBatches,
    replay: Sequence[Sequence[Sequence[Tensor]]] | None,
) -> _Shares:
    dp, gas, gates = len(batches), len(batches[0]), models.gates(model)
    total = torch.zeros((), dtype=DTYPE)
    routing: list[list[list[Tensor]]] = [[] for _ in range(dp)]
    margin = float("inf")
    for m in range(gas):
        logits_by_layer: list[list[Tensor]] = [[] for _ in gates]
        for r in range(dp):
            if replay is not None:
                models.force_routing(gates, replay[r][m])
            loss = functional_call(model, dict(leaves), (), dict(batches[r][m].for_mean(DTYPE)))
            total = total + loss / (dp * gas)
            routing[r].append([layer.indices_TK for layer in gates])
            for index, layer in enumerate(gates):
                logits_by_layer[index].append(layer.logits_TE)
                margin = min(margin, _margin(layer, case.data.ties))
            models.force_routing(gates, [None] * len(gates))
        chosen = [[routing[r][m][i] for r in range(dp)] for i in range(len(logits_by_layer))]
        if case.model.name != "tiny":
            continue  # its loss holds its own auxiliary loss
        for logits, picks in zip(logits_by_layer, chosen, strict=True):
            total = total + auxiliary_loss(case.auxiliary, case.model.score, logits, picks) / gas
    return _Shares(total, routing, margin)


def _margin(layer: models.MoE | Gate, ties: bool) -> float:
    if isinstance(layer, Gate):
        return layer.margin()
    return selection_margin(layer.logits_TE, layer.spec.top_k, ties)


def selection_margin(logits_TE: Tensor, top_k: int, ties: bool = False) -> float:
    """Give the smallest gap between the k-th and the (k+1)-th logit over all tokens.

    With ties a difference of exactly zero is no gap: what counts is how far the tied groups down to
    the one that is cut are from one another and from the next.
    """
    if top_k >= logits_TE.shape[-1]:
        return float("inf")
    ordered = logits_TE.detach().sort(dim=-1, descending=True).values
    gaps = ordered[:, :-1] - ordered[:, 1:]
    if not ties:
        return float(gaps[:, top_k - 1].min())
    apart = gaps > 0.0
    before_TE = apart[:, top_k - 1 :].cumsum(-1) - apart[:, top_k - 1 :].int()
    counts = torch.cat([apart[:, : top_k - 1], apart[:, top_k - 1 :] & (before_TE == 0)], dim=-1)
    return float(gaps.masked_fill(~counts, float("inf")).min())


def auxiliary_loss(
    spec: Auxiliary, score: str, logits: Sequence[Tensor], indices: Sequence[Tensor]
) -> Tensor:
    """Compute one layer's auxiliary losses of one micro-batch, averaged over dp ranks.

    Load balance (Switch Transformer, eq. 4-6, as Hugging Face normalises it): E * sum_e f_e P_e
    with f_e = assignments of e / tokens and P_e the mean routing probability. z-loss (ST-MoE,
    eq. 5): mean of logsumexp(logits)^2. Scope `rank`: each dp rank's own f and P, then the mean;
    scope `global`: f and P over all ranks' tokens.

    Args:
        spec: coefficients and scope.
        score: softmax or sigmoid; sigmoid scores are normalised to probabilities.
        logits: per dp rank (T, E).
        indices: per dp rank (T, K).
    """
    if spec.scope == "global":
        logits, indices = [torch.cat(list(logits))], [torch.cat(list(indices))]
    losses = []
    for logits_TE, indices_TK in zip(logits, indices, strict=True):
        probability_TE = models.scores(logits_TE, score)
        probability_TE = probability_TE / probability_TE.sum(-1, keepdim=True)
        tokens, experts = logits_TE.shape
        load_E = (
            torch.bincount(indices_TK.flatten(), minlength=experts).to(logits_TE.dtype) / tokens
        )
        balance = experts * (load_E * probability_TE.mean(0)).sum()
        z = logits_TE.logsumexp(-1).square().mean()
        losses.append(spec.load_balance * balance + spec.z_loss * z)
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Shares:
    """What each (dp rank, micro-batch) contributes to some gradients: [dp rank][micro-batch].

    main: gradient of its loss's part of the objective, auxiliary losses left out; name -> float64.
    auxiliary: (scope, loss) -> the same for an auxiliary loss through its logits, `load_balance`
        or `z_loss`, those that the case has.
    tokens: how many tokens it has. Main and the case's own scope add up to the whole gradient.
    """

    main: list[list[dict[str, Tensor]]]
    auxiliary: dict[tuple[str, str], list[list[dict[str, Tensor]]]]
    tokens: list[list[int]]

    def of_losses(self, name: str, scope: str) -> dict[str, Tensor]:
        """Add up what each auxiliary loss contributes to one gradient, in a scope."""
        return {
            loss: torch.stack([part[name] for parts in table for part in parts]).sum(0)
            for (of, loss), table in self.auxiliary.items()
            if of == scope
        }


def shares(
    case: Case,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: data.StepBatches,
    names: Sequence[str],
    routing: Sequence[Sequence[Sequence[Tensor]]],
) -> Shares:
    """Split the true gradients of some tensors over (dp rank, micro-batch).

    Args:
        case: the case, for its auxiliary losses.
        model: structure; its own weights are not used.
        weights: full logical name -> any float dtype.
        batches: [dp rank][micro-batch].
        names: tensors whose gradients are split.
        routing: `Evaluation.routing` of the same step, so that it is not chosen anew.
    """
    leaves = {name: w.detach().to(DTYPE).requires_grad_() for name, w in weights.items()}
    dp, gas, gates = len(batches), len(batches[0]), models.gates(model)
    is_tiny = case.model.name == "tiny"  # the loss of the others holds its own auxiliary loss
    has = [loss for loss in AUXILIARY if is_tiny and getattr(case.auxiliary, loss)]
    main: list[list[dict[str, Tensor]]] = [[] for _ in range(dp)]
    auxiliary: dict[tuple[str, str], list[list[dict[str, Tensor]]]]
    auxiliary = {(s, loss): [[] for _ in range(dp)] for s in ("rank", "global") for loss in has}
    with nullcontext() if is_tiny else lifted():
        for m in range(gas):
            logits = []
            for r in range(dp):
                models.force_routing(gates, routing[r][m])
                loss = functional_call(model, dict(leaves), (), dict(batches[r][m].for_mean(DTYPE)))
                main[r].append(_split(loss / (dp * gas), leaves, names))
                logits.append([layer.logits_TE for layer in gates])
            picks = [routing[r][m] for r in range(dp)]
            for (scope, name), table in auxiliary.items():
                for r in range(dp):
                    loss = _auxiliary_of(case, scope, name, r, logits, picks) / gas
                    table[r].append(_split(loss, leaves, names))
    models.force_routing(gates, [None] * len(gates))
    tokens = [[int(batch.input_ids.numel()) for batch in row] for row in batches]
    return Shares(main, auxiliary, tokens)


def _auxiliary_of(
    case: Case,
    scope: str,
    name: str,
    rank: int,
    logits: Sequence[Sequence[Tensor]],
    picks: Sequence[Sequence[Tensor]],
) -> Tensor:
    """Compute one auxiliary loss of one micro-batch, to be differentiated by one rank's logits."""
    others = {other: 0.0 for other in AUXILIARY if other != name}
    spec = case.auxiliary.model_copy(update={"scope": scope, **others})
    layers = []
    for n in range(len(logits[0])):
        seen = [of[n] if r == rank else of[n].detach() for r, of in enumerate(logits)]
        layers.append(auxiliary_loss(spec, case.model.score, seen, [of[n] for of in picks]))
    return torch.stack(layers).sum()


def _split(loss: Tensor, leaves: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Differentiate a part of the objective, keeping its graph for the parts that follow."""
    wanted = [leaves[name] for name in names]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for name, leaf, gradient in zip(names, wanted, found, strict=True)
    }
