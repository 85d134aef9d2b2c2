"""Token-choice router: logits, the chosen experts, their weights, and its auxiliary losses.

Owns what a token is sent to and with which weight. Must not know how tokens travel. Easy to get
wrong: every TP lane routes *all* tokens (route_full), so counts over dp must not add up lanes.

Shapes: T tokens, H hidden, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fold_impl.groups import Group
from fold_impl.points import Points

CORRECTION_BIAS = "e_score_correction_bias"
"""Buffer of a router that is added to the scores experts are chosen by, not to their weights."""


@dataclass(frozen=True)
class RouterOptions:
    """What the chosen scores are made of; top_k None: the model's own gate chooses."""

    top_k: int | None
    score: str = "softmax"
    normalize: bool = True


@dataclass(frozen=True)
class AuxiliaryOptions:
    """Coefficients of the auxiliary losses and the tokens they look at: `rank` or `global`."""

    load_balance: float = 0.0
    z_loss: float = 0.0
    scope: str = "rank"

    @property
    def active(self) -> bool:
        """Whether any auxiliary loss is asked for."""
        return self.load_balance > 0 or self.z_loss > 0


@dataclass(frozen=True)
class Choice:
    """Routing of T tokens. indices_TK int64, best first; weights_TK carries the gradient."""

    logits_TE: Tensor
    indices_TK: Tensor
    weights_TK: Tensor


def choose(
    logits_TE: Tensor,
    options: RouterOptions,
    forced_TK: Tensor | None,
    point: Callable[..., Tensor],
    bias_E: Tensor | None = None,
) -> Choice:
    """Pick the top_k largest logits of each token, the lowest index on a tie, and weigh them.

    With a correction bias scores + bias are compared instead (DeepSeek-V3, arXiv:2412.19437, eq.
    16); the weights are the scores alone.

    Args:
        logits_TE: (T, E).
        options: top_k (not None), score function, normalisation.
        forced_TK: experts to use instead of the own choice (replay), or None.
        point: (name, value) -> value.
        bias_E: correction bias, or None.
    """
    softmax = options.score == "softmax"
    scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
    if forced_TK is None:
        by_TE = (logits_TE if bias_E is None else scores_TE + bias_E).detach()
        order = by_TE.sort(dim=-1, descending=True, stable=True).indices
        forced_TK = order[:, : options.top_k]
    indices_TK = point("router.indices", forced_TK)
    weights_TK = scores_TE.gather(-1, indices_TK)
    if options.normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Choice(logits_TE, indices_TK, point("router.weights", weights_TK))


def auxiliary_loss(
    choice: Choice,
    router: RouterOptions,
    options: AuxiliaryOptions,
    dp: Group,
    points: Points,
    layer: int,
) -> Tensor:
    """Compute this dp rank's share of load-balance and z-loss of one layer and micro-batch.

    load balance = E * sum_e f_e P_e (Switch Transformer, eq. 4-6; f_e = assignments of e over
    tokens, as Hugging Face normalises it), z = mean logsumexp^2 (ST-MoE, eq. 5). Dense gradients
    are averaged over dp, so under scope `global` the rank's share is dp * (its tokens' part).

    Collective under scope `global` (all-reduce of E + 1 counts over dp, no gradient).
    """
    # counts above 256 have no value in bfloat16, above 65504 none in float16
    logits_TE = choice.logits_TE.to(torch.promote_types(choice.logits_TE.dtype, torch.float32))
    tokens, experts = logits_TE.shape
    softmax = router.score == "softmax"
    probability_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
    probability_TE = probability_TE / probability_TE.sum(-1, keepdim=True)
    counts = torch.bincount(choice.indices_TK.flatten(), minlength=experts)
    counts = torch.cat([counts, counts.new_tensor([tokens])])
    share = 1.0
    scope = points("auxiliary.scope", options.scope, layer=layer)
    if scope == "global" and dp.handle is not None:
        torch.distributed.all_reduce(counts, group=dp.handle)
        share = dp.size
    exact = counts.to(probability_TE.dtype)
    load_E = points("auxiliary.load", exact[:-1], layer=layer)
    total = points("auxiliary.tokens", exact[-1], layer=layer)
    balance = experts * (load_E / total * (probability_TE.sum(0) / total)).sum()
    z = logits_TE.logsumexp(-1).square().sum() / total
    balance = points("auxiliary.load_balance", balance, layer=layer)
    z = points("auxiliary.z_loss", z, layer=layer)
    loss = share * (options.load_balance * balance + options.z_loss * z)
    passed: Tensor = points("auxiliary.loss", loss, layer=layer)
    return passed


class Router(nn.Module):
    """Linear gate: (T, H) -> (T, E); adopts the parameters of the module it replaces."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, correction_E: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        if correction_E is not None:
            self.register_buffer(CORRECTION_BIAS, correction_E)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Compute the logits."""
        return nn.functional.linear(x_TH, self.weight, self.bias)
