"""The folded MoE layer: route-full, partition-dispatch, restore.

Owns the order of the steps of one forward. Must not know optimizers or reductions. Easy to get
wrong: the one input boundary feeds router logits *and* experts; the shared expert sits outside it
and gives this lane's rows only, which join the routed ones before the restore.

Shapes: T tokens replicated over tp, own rows = this lane's share, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fold_impl import dispatch, rows
from fold_impl.experts import RoutedExperts
from fold_impl.groups import FoldGroups
from fold_impl.points import Points
from fold_impl.router import (
    CORRECTION_BIAS,
    AuxiliaryOptions,
    Choice,
    RouterOptions,
    auxiliary_loss,
    choose,
)


@dataclass(frozen=True)
class Journey:
    """Where this rank's rows go: splits of the EP all-to-all and the order the experts take.

    send, receive: rows per EP rank. etp_sizes: rows each expert-TP rank brings.
    by_expert: permutation from arrival order to expert order, by_arrival: its inverse. counts:
    rows per local expert.
    """

    send: list[int]
    receive: list[int]
    etp_sizes: list[int]
    by_expert: Tensor
    by_arrival: Tensor
    counts: list[int]


class FoldedMoE(nn.Module):
    """Drop-in replacement of a MoE block on folded ranks.

    After a forward, `indices_TK` holds the experts of all T tokens and `auxiliary` this
    micro-batch's auxiliary loss (a scalar tensor, or 0.0). Where `load_E` is a tensor, forwards
    that train add the tokens of each expert to it.
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        experts: RoutedExperts,
        shared: nn.Module | None,
        num_experts: int,
        options: RouterOptions,
        auxiliary: AuxiliaryOptions,
        groups: FoldGroups,
        points: Points,
        layer: int,
        names: tuple[str, str, str | None],
    ) -> None:
        super().__init__()
        self._names = names
        for name, module in zip(names, (router, experts, shared), strict=True):
            if name is not None:
                self.add_module(name, module)
        self.num_experts, self.options, self.auxiliary_options = num_experts, options, auxiliary
        self.groups, self.points, self.layer = groups, points, layer
        self.forced_TK: Tensor | None = None
        self.indices_TK: Tensor | None = None
        self.auxiliary: Tensor | float = 0.0
        self.load_E: Tensor | None = None

    def get_router(self) -> nn.Module:
        """Give the gate, whatever the model calls it."""
        return self.get_submodule(self._names[0])

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., H), replicated over tp, to the same shape, equal on every lane."""
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        own_TH = self._point("moe.combined", self._routed(x_TH))
        if self._names[2] is not None:
            shared_TH = self.get_submodule(self._names[2])(x_TH)
            own_TH = own_TH + self._point("shared.output", shared_TH)
        tp = self.groups.tp
        restore = self._point("moe.restore", dispatch.restore_combined, group=tp)
        y_TH: Tensor = self._point("moe.restored", restore(own_TH, x_TH.shape[0], tp))
        return y_TH.reshape(hidden.shape)

    def _point(self, name: str, value: Any, **context: Any) -> Any:
        return self.points(name, value, layer=self.layer, **context)

    def _routed(self, x_TH: Tensor) -> Tensor:
        """Route all T tokens and give the routed experts' output for this lane's rows."""
        tp = self.groups.tp
        enter: Callable[..., Tensor] = self._point("moe.input", dispatch.enter_routed, group=tp)
        x_TH = self._point("moe.entered", enter(x_TH, tp))
        choice = self._choice(x_TH)
        self.indices_TK = choice.indices_TK
        if self.load_E is not None and self.training and torch.is_grad_enabled():
            self.load_E += torch.bincount(choice.indices_TK.flatten(), minlength=self.num_experts)
        if self.auxiliary_options.active:
            options, dp = self.auxiliary_options, self.groups.dp
            self.auxiliary = auxiliary_loss(
                choice, self.options, options, dp, self.points, self.layer
            )
        tokens = x_TH.shape[0]
        bounds = self._point("dispatch.share", dispatch.share_bounds(tokens, tp), tokens=tokens)
        own = slice(*bounds)
        return self._share(x_TH, choice.indices_TK, choice.weights_TK, own)

    def _choice(self, x_TH: Tensor) -> Choice:
        """Ask the router: ours gives logits, a model's own gate (logits, weights, indices)."""
        answer = self.get_router()(x_TH)
        if self.options.top_k is not None:
            logits_TE = self._point("router.logits", answer)
            bias_E = getattr(self.get_router(), CORRECTION_BIAS, None)
            return choose(logits_TE, self.options, self.forced_TK, self._point, bias_E)
        assert self.forced_TK is None, "a model's own gate cannot be forced"
        logits_TE, weights_TK, indices_TK = answer
        return Choice(
            self._point("router.logits", logits_TE),
            self._point("router.indices", indices_TK),
            self._point("router.weights", weights_TK),
        )

    def _share(self, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, own: slice) -> Tensor:
        """Send this lane's (token, expert) assignments through the experts and combine them."""
        flat = self._point("dispatch.experts", indices_TK[own].flatten())
        order = flat.argsort(stable=True)
        top_k = indices_TK.shape[1]
        slot = rows.inverse(order)
        sent = self._point("dispatch.rows", rows.spread(x_TH[own], order, slot, top_k))
        returned = self._through_experts(sent, flat)
        weights = self._point("combine.weights", weights_TK[own].to(returned.dtype))
        return rows.combine(returned, weights, order, slot)

    def _through_experts(self, sent: Tensor, flat: Tensor) -> Tensor:
        """EP all-to-all, expert-TP gather, experts, and both back; rows sorted by expert."""
        ep, etp = self.groups.ep, self.groups.etp
        journey = self._plan(torch.bincount(flat, minlength=self.num_experts))
        splits = self._point("dispatch.splits", (journey.send, journey.receive))
        there = self._point("dispatch.backward_splits", (splits[1], splits[0]))
        x = self._exchange("there")(sent, splits, ep, there)
        gather = self._point("expert.gather", dispatch.gather_rows)
        x = gather(x, journey.etp_sizes, etp)
        counts = journey.counts
        x = rows.permute(x, journey.by_expert, journey.by_arrival)
        x = self._point("dispatch.received", x, counts=counts)
        y = self.get_submodule(self._names[1])(x, counts)
        y = self._point("expert.output", y, counts=counts)
        scatter = self._point("expert.scatter", dispatch.scatter_rows)
        y = scatter(rows.permute(y, journey.by_arrival, journey.by_expert), journey.etp_sizes, etp)
        y = self._point("expert.partial", y)
        return self._exchange("back")(y, (splits[1], splits[0]), ep, splits)

    def _exchange(self, way: str) -> Callable[..., Tensor]:
        exchange: Callable[..., Tensor] = self._point(
            "dispatch.exchange", dispatch.all_to_all, way=way
        )
        return exchange

    @torch.no_grad()
    def _plan(self, sent_E: Tensor) -> Journey:
        """Tell every rank how many rows of each of its experts come from where.

        Collective: all-to-all of E counts over ep, all-gather of them over etp, one host copy.
        """
        ep, etp = self.groups.ep, self.groups.etp
        local = self.num_experts // ep.size
        received = dispatch.exchange(sent_E, [local] * ep.size, [local] * ep.size, ep)
        gathered = dispatch.gather_equal(received, etp)
        host = torch.cat([sent_E, gathered]).tolist()
        sent, table = host[: len(host) - gathered.numel()], gathered.view(-1, local)
        came = host[len(sent) :]
        blocks = [sum(came[i * local : (i + 1) * local]) for i in range(etp.size * ep.size)]
        first = etp.index * ep.size
        expert_of_row = torch.arange(local, device=table.device).repeat(table.shape[0])
        expert_of_row = expert_of_row.repeat_interleave(table.flatten(), output_size=sum(came))
        by_expert = expert_of_row.argsort(stable=True)
        return Journey(
            send=[sum(sent[i * local : (i + 1) * local]) for i in range(ep.size)],
            receive=blocks[first : first + ep.size],
            etp_sizes=[sum(blocks[i * ep.size : (i + 1) * ep.size]) for i in range(etp.size)],
            by_expert=by_expert,
            by_arrival=rows.inverse(by_expert),
            counts=[sum(came[e::local]) for e in range(local)],
        )
